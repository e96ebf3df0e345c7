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


class CheckedBinReader:
    """Stands in for megatron's reader of a `.bin` and compares each block with its hash before its first use.

    Args:
        reader: megatron's reader.
        data: the `.bin`.
        hashes: of its blocks, uint64 [blocks].
    """

    def __init__(self, reader: Any, data: Path, hashes: np.ndarray) -> None:
        self._reader, self._data, self._hashes = reader, data, hashes
        self._size = data.stat().st_size
        self._bytes = np.memmap(data, dtype=np.uint8, mode="r")
        self._known = np.zeros(len(hashes), dtype=bool)

    def read(self, dtype: type[np.number[Any]], count: int, offset: int) -> np.ndarray:
        """``count`` items from byte ``offset`` on.

        Raises:
            ConfigError: a byte of their blocks has changed since the build.
        """
        first, last = (
            int(offset) // BLOCK_BYTES,
            (int(offset) + int(count) * np.dtype(dtype).itemsize - 1) // BLOCK_BYTES,
        )
        for block in range(first, last + 1):
            if not self._known[block]:
                self._check(block)
        return np.asarray(self._reader.read(dtype, count, offset))

    def _check(self, block: int) -> None:
        start = block * BLOCK_BYTES
        if xxhash.xxh3_64_intdigest(self._bytes[start : start + BLOCK_BYTES].data) != int(self._hashes[block]):
            stop = min(start + BLOCK_BYTES, self._size)
            raise ConfigError(
                f"{self._data} has changed since it was built: bytes {start} to {stop} do not have the hash in "
                f"{os.path.basename(self._data.with_suffix(SUFFIX))}; restore the file or build the corpus again"
            )
        self._known[block] = True
