"""A corpus on disk: `.bin`, `.idx` and `corpus.json`, their checks and fingerprints."""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from longcat.errors import ConfigError

END_OF_DOCUMENT = "<|endoftext|>"
INFO_NAME, TOKENIZER_NAME = "corpus.json", "tokenizer.json"
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
_ITEM_SIZE = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}  # Megatron's codes of the integer dtypes -> bytes
_HOW_TO_BUILD = "build it with `longcat data build` (or `make train`), or correct data.paths"


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

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes per token."""
        return self.bytes / max(1, self.tokens)


def info_path(prefix: str | Path) -> Path:
    """`data/x/corpus` → `data/x/corpus.json`."""
    return Path(f"{prefix}.json")


def write_info(path: Path, info: CorpusInfo) -> None:
    """Write `info` as indented JSON."""
    path.write_text(json.dumps(asdict(info), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_info(prefix: str | Path) -> CorpusInfo | None:
    """The `corpus.json` of `prefix`; None if it does not exist, as for corpora of other tools.

    Raises:
        ConfigError: the file exists and cannot be parsed.
    """
    path = info_path(prefix)
    if not path.is_file():
        return None
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
        return CorpusInfo(**{item.name: loaded[item.name] for item in fields(CorpusInfo)})
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError(
            f"{path} is damaged ({type(error).__name__}: {error}); build the corpus again with data.overwrite=true"
        ) from error


def check_corpus(prefix: str | Path) -> None:
    """Check that the pair `.bin`/`.idx` exists, is a Megatron index, has tokens, and that the sizes agree.

    Raises:
        ConfigError: one line with the file and what to do.
    """
    idx, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    missing = [path.name for path in (idx, data) if not path.is_file()]
    if missing:
        raise ConfigError(f"data.paths: {prefix} has no {' and no '.join(missing)}; {_HOW_TO_BUILD}")
    item_size, lengths = _read_lengths(idx)
    tokens = int(lengths.sum(dtype=np.int64))
    if tokens == 0:
        raise ConfigError(f"the corpus {prefix} is empty (0 tokens); {_HOW_TO_BUILD}")
    expected, actual = tokens * item_size, data.stat().st_size
    if expected != actual:
        raise ConfigError(
            f"{data} has {actual} bytes where its index asks for {expected}: truncated or not its pair; build it again"
        )


def _read_lengths(idx: Path) -> tuple[int, np.ndarray]:
    """Bytes of a token and the lengths of the sequences, int32 [sequences], from a checked header."""
    bad = f"{idx} is not a Megatron index (.idx)"
    size = idx.stat().st_size
    with idx.open("rb") as stream:
        head = stream.read(_HEADER.size)
        if len(head) < _HEADER.size:
            raise ConfigError(f"{bad}: {size} bytes are less than its header; {_HOW_TO_BUILD}")
        magic, version, code, sequences, documents = _HEADER.unpack(head)
        if magic != _MAGIC or version != 1 or code not in _ITEM_SIZE:
            raise ConfigError(f"{bad}: its header reads {head[:18].hex()}; {_HOW_TO_BUILD}")
        expected = _HEADER.size + 12 * sequences + 8 * documents
        if size not in (expected, expected + sequences):  # with one mode byte for each sequence
            raise ConfigError(f"{idx} has {size} bytes where its header asks for {expected}: truncated; build it again")
        lengths = np.fromfile(stream, dtype="<i4", count=sequences)
    if sequences and int(lengths.min()) < 0:
        raise ConfigError(f"{bad}: it holds negative lengths; {_HOW_TO_BUILD}")
    return _ITEM_SIZE[code], lengths


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
        found[prefix] = digest.hexdigest()[:16]
    return found
