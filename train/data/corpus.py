"""A corpus on disk: `.bin`, `.idx` and `corpus.json`, their checks and fingerprints."""

from __future__ import annotations

import functools
import hashlib
import os
import struct
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from longcat.errors import ConfigError
from train.checkpoint.files import file_hash
from train.data import blocks
from train.data.config import TOKENIZER_NAME
from train.run_dir.sealed import read_sealed, write_sealed

END_OF_DOCUMENT = "<|endoftext|>"
INFO_NAME = "corpus.json"
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
# Megatron's codes of the integer dtypes
_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_HOW_TO_BUILD = "build it with `longcat data build` (or `make train`), or correct data.paths"
_PART = 1 << 22  # sequences of an index that are checked at a time

INDEX_BYTES = 1 << 22  # of an index that are hashed, enough to tell corpora apart


@dataclass
class CorpusInfo:
    """The content of `corpus.json`; `tokens` counts the ends of documents, `bytes` is UTF-8 text alone."""

    documents: int
    tokens: int
    bytes: int
    vocab_size: int
    max_token_id: int
    eod: int
    source: str
    tokenizer_sha256: str
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    files: int = 0  # local files that were read; 0 for a hub data set
    hashes: dict[str, str] = field(default_factory=dict)  # suffix → XXH3-128 of the file; empty in older corpora

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token."""
        return self.bytes / max(1, self.tokens)


def info_path(prefix: str | Path) -> Path:
    """`data/x/corpus` → `data/x/corpus.json`."""
    return Path(f"{prefix}.json")


def note(text: str, any_rank: bool = False) -> None:
    """Tell the user something that is no error; only the first rank does unless ``any_rank``."""
    if any_rank or os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr, flush=True)


@functools.cache
def note_once(text: str, any_rank: bool = False) -> None:
    """`note`, once in this process: two splits read the same corpus."""
    note(text, any_rank)


def write_info(path: Path, info: CorpusInfo) -> None:
    """Write `info` as indented JSON with a hash of itself, synced."""
    write_sealed(path, asdict(info))


def read_info(prefix: str | Path) -> CorpusInfo | None:
    """The `corpus.json` of `prefix`; None if it does not exist, as for corpora of other tools.

    Raises:
        ConfigError: the file exists and cannot be parsed, or a byte of it has changed.
    """
    path = info_path(prefix)
    if not path.is_file():
        return None
    try:
        loaded = read_sealed(path, required=False)
        info = CorpusInfo(**{item.name: loaded[item.name] for item in fields(CorpusInfo) if item.name in loaded})
    except (ValueError, TypeError, OSError) as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {error}); build the corpus again with data.overwrite=true"
        ) from error
    return info


def find_pair(prefix: str | Path) -> tuple[Path, Path]:
    """The `.idx` and the `.bin` of a corpus, which are not opened.

    Raises:
        ConfigError: one of them is not there.
    """
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    missing = [path.name for path in (idx, data) if not path.is_file()]
    if missing:
        raise ConfigError(f"data.paths: {prefix} has no {' and no '.join(missing)}; {_advice(Path(prefix))}")
    return idx, data


def check_corpus(prefix: str | Path) -> None:
    """Check that the pair `.bin`/`.idx` exists, is a Megatron index, has tokens, and that the sizes agree.

    Raises:
        ConfigError: one line with the file and what to do.
    """
    idx, data = find_pair(prefix)
    index = read_index(idx)
    if (tokens := index.num_tokens) == 0:
        raise ConfigError(f"the corpus {prefix} is empty (0 tokens); {_HOW_TO_BUILD}")
    expected, actual = tokens * index.dtype.itemsize, data.stat().st_size
    if expected != actual:
        raise ConfigError(
            f"{data} has {actual} bytes where its index asks for {expected}: truncated or not its pair; build it again"
        )


def verify_corpus(prefix: str | Path) -> CorpusInfo | None:
    """As `check_corpus`, then compare what can be compared in seconds; returns its `corpus.json`.

    Of a corpus that `longcat data build` made: the hashes of the index, of the tokenizer and of the block hashes, which
    `blocks.BinReader` compares with the token ids. Of any: whether the index fits itself.

    Raises:
        ConfigError: one line with the file and what to do.
    """
    check_corpus(prefix)
    _check_structure(Path(f"{prefix}.idx"))
    info = read_info(prefix)
    if info is None:
        return None
    for suffix, wanted in info.hashes.items():
        path = Path(f"{prefix}{suffix}")
        if not path.is_file():
            note_once(f"{path} is missing: damage of {prefix}.bin would not be noticed; copy it too")
        elif file_hash(path) != wanted:
            raise ConfigError(f"{path} has changed since it was built; restore the file or build the corpus again")
    tokenizer = Path(prefix).parent / TOKENIZER_NAME
    if tokenizer.is_file() and file_sha256(tokenizer) != info.tokenizer_sha256:
        raise ConfigError(
            f"{tokenizer} is not the tokenizer that the corpus {prefix} was built with (SHA-256 "
            f"{info.tokenizer_sha256[:12]}…); restore it or build the corpus again"
        )
    return info


def block_hashes(prefix: str | Path, info: CorpusInfo | None) -> np.ndarray | None:
    """Hashes of the blocks of a `.bin`, uint64 [blocks], for `blocks.BinReader`; None if there are none."""
    path = Path(f"{prefix}{blocks.SUFFIX}")
    if info is None or blocks.SUFFIX not in info.hashes or not path.is_file():
        return None
    return np.fromfile(path, dtype="<u8")


def _advice(prefix: Path) -> str:
    """What to do about a corpus that is not there."""
    if prefix.suffix in (".bin", ".idx") and prefix.is_file():
        return f"give the prefix without the suffix: {prefix.with_suffix('')}"
    if prefix.is_dir():
        pairs = sorted(path.with_suffix("") for path in prefix.glob("*.idx"))
        if pairs:
            return f"it is a folder; give the prefix of a pair in it, such as {pairs[0]}"
    return _HOW_TO_BUILD


@dataclass(frozen=True)
class Index:
    """The content of an `.idx`, mapped into memory."""

    dtype: np.dtype[Any]  # of the token ids
    num_tokens: int
    lengths: np.ndarray  # tokens of each sequence, int32 [sequences]
    pointers: np.ndarray  # first byte of each sequence, int64 [sequences]
    bounds: np.ndarray  # first sequence of each document, and the end of the last one, int64 [documents + 1]


def read_index(idx: Path) -> Index:
    """An index whose header and size fit each other.

    Raises:
        ConfigError: it is no Megatron index, or truncated.
    """
    bad = f"{idx} is not a Megatron index (.idx)"
    size = idx.stat().st_size
    with idx.open("rb") as stream:
        head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size:
        raise ConfigError(f"{bad}: {size} bytes are less than its header; {_HOW_TO_BUILD}")
    magic, version, code, sequences, documents = _HEADER.unpack(head)
    if magic != _MAGIC or version != 1 or code not in _DTYPES:
        raise ConfigError(f"{bad}: its header reads {head[:18].hex()}; {_HOW_TO_BUILD}")
    expected = _HEADER.size + 12 * sequences + 8 * documents
    if size not in (expected, expected + sequences):  # with one mode byte for each sequence
        raise ConfigError(f"{idx} has {size} bytes where its header asks for {expected}: truncated; build it again")
    content = np.memmap(idx, dtype=np.uint8, mode="r")
    parts, start = [], _HEADER.size
    for dtype, count in (("<i4", sequences), ("<i8", sequences), ("<i8", documents)):
        stop = start + np.dtype(dtype).itemsize * count
        parts.append(content[start:stop].view(dtype))
        start = stop
    status = idx.stat()
    shortest, tokens = _lengths(idx, sequences, (status.st_ino, status.st_size, status.st_mtime_ns))
    if shortest < 0:
        raise ConfigError(f"{bad}: it holds negative lengths; {_HOW_TO_BUILD}")
    return Index(np.dtype(_DTYPES[code]), tokens, *parts)


@functools.lru_cache(maxsize=256)
def _lengths(idx: Path, sequences: int, version: tuple[int, ...]) -> tuple[int, int]:
    """The least of the lengths of an index and their sum; read once in each process, which opens it several times.

    Args:
        version: tells a file from a later one of the same name.
    """
    if not sequences:
        return 0, 0
    lengths = np.memmap(idx, "<i4", "r", _HEADER.size, (sequences,))
    return int(lengths.min()), int(lengths.sum(dtype=np.int64))


def _check_structure(idx: Path) -> None:
    """Raise ConfigError if sequences do not follow each other, or documents do not."""
    index = read_index(idx)
    position = 0
    for start in range(0, len(index.lengths), _PART):
        sizes = index.lengths[start : start + _PART].astype(np.int64) * index.dtype.itemsize
        ends = position + np.cumsum(sizes)
        if not np.array_equal(index.pointers[start : start + _PART], ends - sizes):
            raise ConfigError(f"{idx} is damaged: its sequences do not follow each other; restore or build it again")
        position = int(ends[-1])
    bounds = index.bounds
    wrong = not len(bounds) or bounds[0] != 0 or bounds[-1] != len(index.lengths) or bool((np.diff(bounds) < 0).any())
    if wrong:
        raise ConfigError(f"{idx} is damaged: its documents do not follow each other; restore or build it again")


def file_sha256(path: Path) -> str:
    """SHA-256 of a small file, hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tokenizer_sha256(prefixes: list[str]) -> str | None:
    """SHA-256 of the tokenizer.json that made the ids of ``prefixes``; None if unknown.

    From the first corpus where it is known: from its corpus.json, else from the file beside it.
    """
    for prefix in prefixes:
        info, beside = read_info(prefix), Path(prefix).parent / TOKENIZER_NAME
        if info is not None:
            return info.tokenizer_sha256
        if beside.is_file():
            return file_sha256(beside)
    return None


def fingerprints(prefixes: list[str]) -> dict[str, str]:
    """Fingerprints of ``prefixes``, by sizes, index and tokenizer, to detect another corpus of the same name.

    Raises:
        ConfigError: a corpus is missing or damaged.
    """
    found = {}
    for prefix in prefixes:
        check_corpus(prefix)
        info = read_info(prefix)
        digest = hashlib.sha256(str(info.tokenizer_sha256 if info else None).encode())
        for suffix in (".bin", ".idx"):
            digest.update(str(Path(f"{prefix}{suffix}").stat().st_size).encode())
        with Path(f"{prefix}.idx").open("rb") as index:
            digest.update(index.read(INDEX_BYTES))
        if info and info.hashes:
            digest.update(str(sorted(info.hashes.items())).encode())
        found[prefix] = digest.hexdigest()[:16]
    return found
