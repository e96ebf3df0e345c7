"""Hashes of a corpus's blocks: written by a build, compared when a block of token ids is read for the first time."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from longcat.errors import ConfigError
from train.checkpoint.files import HashedFile

SUFFIX = ".xxh3"  # of the file with one XXH3-64 for each block of the `.bin`
BLOCK_BYTES = 1 << 16  # about what the kernel reads ahead, so the comparison costs no reading


def write_block_hashes(data: Path, target: Path) -> str:
    """Write the hashes of ``data``, uint64 [blocks], synced; returns the hash of ``target``."""
    with data.open("rb") as stream, HashedFile(target) as hashes:
        while block := stream.read(BLOCK_BYTES):
            hashes.write(xxhash.xxh3_64_intdigest(block).to_bytes(8, "little"))
    return hashes.hash


class BinReader:
    """Reads a `.bin`, and compares each block with its hash before its first use.

    Args:
        data: the `.bin`.
        dtype: of the token ids.
        hashes: of its blocks, uint64 [blocks]; None if there are none to compare with.
    """

    def __init__(self, data: Path, dtype: np.dtype[Any], hashes: np.ndarray | None) -> None:
        self._data, self._dtype, self._hashes = data, dtype, hashes
        self._size = data.stat().st_size
        self._bytes = np.memmap(data, dtype=np.uint8, mode="r") if self._size else np.zeros(0, dtype=np.uint8)
        self._known = np.zeros(0 if hashes is None else len(hashes), dtype=bool)

    def read(self, count: int, offset: int) -> np.ndarray:
        """``count`` token ids from byte ``offset`` on.

        Raises:
            ConfigError: a byte of their blocks has changed since the build.
        """
        if self._hashes is not None:
            last = (offset + count * self._dtype.itemsize - 1) // BLOCK_BYTES
            for block in range(offset // BLOCK_BYTES, last + 1):
                if not self._known[block]:
                    self._check(block, int(self._hashes[block]))
        return np.frombuffer(self._bytes, self._dtype, count, offset) if count else np.zeros(0, self._dtype)

    def _check(self, block: int, wanted: int) -> None:
        start = block * BLOCK_BYTES
        if xxhash.xxh3_64_intdigest(self._bytes[start : start + BLOCK_BYTES].data) != wanted:
            stop = min(start + BLOCK_BYTES, self._size)
            raise ConfigError(
                f"{self._data} has changed since it was built: bytes {start} to {stop} do not have the hash in "
                f"{os.path.basename(self._data.with_suffix(SUFFIX))}; restore the file or build the corpus again"
            )
        self._known[block] = True
