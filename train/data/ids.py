"""Whether the ids of the corpora fit the model's vocabulary, checked before a run starts."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longcat.errors import ConfigError
from longcat.json_text import dumps
from train.data.corpus import TOKENIZER_NAME, check_corpus, note, read_index, read_info
from train.data.tokens import load_tokenizer, num_ids
from train.run_dir.sealed import read_sealed, write_sealed

SCAN_SECONDS = 60.0  # for all corpora of a start together; ids further on are checked when they are read
_ANNOUNCED_BYTES = 1 << 32  # a scan of more bytes than this is announced
_PART = 1 << 24  # ids at a time


@dataclass(frozen=True)
class IdRange:
    """The lowest and the highest id of the first ``scanned`` ids of a corpus."""

    lowest: int
    highest: int
    scanned: int


def check_ids(paths: list[str], vocab_size: int, folders: list[Path]) -> None:
    """Check that all ids of the corpora are below ``vocab_size``.

    A build records the highest id in corpus.json. Pairs of other tools are read once, for at most `SCAN_SECONDS`
    together, and the results are kept in the first of ``folders`` that can be written. A pair that the time did not
    reach is read at the next start.

    Raises:
        ConfigError: with the corpus, the id and what to do.
    """
    end = time.monotonic() + SCAN_SECONDS
    for prefix in paths:
        check_corpus(prefix)
        info = read_info(prefix)
        check_range(prefix, *(_range_of(prefix, folders, end) if info is None else (0, info.max_token_id)), vocab_size)


def check_range(prefix: str, lowest: int, highest: int, vocab_size: int) -> None:
    """Raise ConfigError unless 0 ≤ ``lowest`` and ``highest`` < ``vocab_size``."""
    if lowest < 0 or highest >= vocab_size:
        raise ConfigError(
            f"the corpus {prefix} holds the token id {highest if highest >= vocab_size else lowest} but "
            f"model.vocab_size={vocab_size}; raise model.vocab_size past it or build the corpus with a smaller "
            f"vocabulary"
        )


def unused_ids(paths: list[str], vocab_size: int) -> str | None:
    """A sentence for the user if the corpora's tokenizer has fewer ids than the model; None if not, or if unknown."""
    sizes = [size for prefix in paths if (size := _tokenizer_size(prefix)) is not None]
    if not sizes or max(sizes) >= vocab_size:
        return None
    return (
        f"model.vocab_size={vocab_size:,} but the corpora's tokenizer has {max(sizes):,} ids: no text trains the other "
        f"{vocab_size - max(sizes):,} rows of the embedding and the head; model.vocab_size={max(sizes)} leaves them out"
    )


def _tokenizer_size(prefix: str) -> int | None:
    info, beside = read_info(prefix), Path(prefix).parent / TOKENIZER_NAME
    if info is not None:
        return info.vocab_size
    return num_ids(load_tokenizer(beside)) if beside.is_file() else None


def _range_of(prefix: str, folders: list[Path], end: float) -> tuple[int, int]:
    data = Path(f"{prefix}.bin")
    status = data.stat()
    identity: list[Any] = [str(data.resolve()), status.st_size, status.st_mtime_ns]
    name = f"ids-{hashlib.sha256(dumps(identity).encode()).hexdigest()[:24]}.json"
    for folder in folders:
        with contextlib.suppress(OSError, ValueError, TypeError):
            known = IdRange(**read_sealed(folder / name))
            return known.lowest, known.highest
    seconds = end - time.monotonic()
    if status.st_size > _ANNOUNCED_BYTES and seconds > 0:
        note(f"reading {data} once to find its highest id, at most {seconds:.0f} s")
    found = scan(data, read_index(Path(f"{prefix}.idx")).dtype, seconds)
    for folder in folders if found.scanned else []:
        with contextlib.suppress(OSError):
            _keep(folder / name, found)
            break
    return found.lowest, found.highest


def scan(data: Path, dtype: np.dtype[Any], seconds: float = SCAN_SECONDS) -> IdRange:
    """The range of the ids of a `.bin`, from its start for at most ``seconds``."""
    ids = np.memmap(data, dtype=dtype, mode="r")
    end, lowest, highest, position = time.monotonic() + seconds, 0, 0, 0
    while position < len(ids) and time.monotonic() < end:
        part = ids[position : position + _PART]
        lowest, highest = min(lowest, int(part.min())), max(highest, int(part.max()))
        position += len(part)
    return IdRange(lowest, highest, position)


def _keep(path: Path, found: IdRange) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}-{uuid.uuid4().hex}")
    try:
        write_sealed(partial, asdict(found))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
