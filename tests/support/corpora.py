"""Megatron corpora written by hand, independent of the writer under test."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.data.config import DataConfig
from train.data.samples import TokenSamples

LENGTH, VOCABULARY = 16, 1 << 20


def write_corpus(prefix: Path, documents: Sequence[np.ndarray], sequences_each: int = 1) -> str:
    """Write a pair of int32 ids at ``prefix``; each document is cut into ``sequences_each`` sequences. Returns it."""
    pieces = [part for document in documents for part in np.array_split(document, sequences_each)]
    lengths = np.array([len(piece) for piece in pieces], dtype="<i4")
    pointers = (np.cumsum(lengths, dtype=np.int64) - lengths) * 4
    bounds = np.arange(len(documents) + 1, dtype="<i8") * sequences_each
    prefix.parent.mkdir(parents=True, exist_ok=True)
    body = np.concatenate(pieces).astype("<i4") if pieces else np.zeros(0, "<i4")
    Path(f"{prefix}.bin").write_bytes(body.tobytes())
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, len(lengths), len(bounds))
    Path(f"{prefix}.idx").write_bytes(head + lengths.tobytes() + pointers.tobytes() + bounds.tobytes())
    return str(prefix)


def unique_documents(count: int, first_id: int, seed: int = 0) -> list[np.ndarray]:
    """Documents of 1 to 60 tokens without repeated ids (the last of each ends it)."""
    lengths = np.random.default_rng(seed).integers(1, 60, size=count)
    ids = np.arange(first_id, first_id + lengths.sum())
    return np.split(ids, np.cumsum(lengths)[:-1])


def two_corpora(folder: Path) -> list[str]:
    """Two corpora without a common id; the second one has 3 sequences per document."""
    first = write_corpus(folder / "a" / "corpus", unique_documents(200, 0))
    second = write_corpus(folder / "b" / "corpus", unique_documents(90, 500_000, 1), sequences_each=3)
    return [first, second]


def samples_of(paths: list[str], cache: Path, split: str = "train", **changes: Any) -> TokenSamples:
    """Samples of LENGTH tokens, with ``changes`` of their arguments and of the configuration."""
    values = {"sequence_length": LENGTH, "seed": 3, "vocab_size": VOCABULARY} | {
        key: changes.pop(key) for key in ("sequence_length", "seed", "vocab_size", "writes") if key in changes
    }
    config = DataConfig("n", "s", paths=paths, **({"validation_fraction": 0.1} | changes))
    return TokenSamples(config, split=split, cache_dir=cache, **values)  # type: ignore[arg-type]
