"""Tensors read out of torch.distributed.checkpoint's shards straight into their place, by several threads.

A shard is a row of records, each a tensor as torch.save writes it: an archive in which the values lie in one stretch,
not compressed. Torch's own reader copies a record into a buffer, makes a tensor of that and copies it once more; here
only an archive's index is decoded, and the values go from the file into the memory that wants them.
"""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.distributed.checkpoint.utils import _create_file_view
from torch.futures import Future

BLOCK = 1 << 24  # bytes of one read, and of a thread's buffer for what cannot be read into its place
THREADS = 4  # one decodes an archive's index while others wait for the disk


@dataclass(frozen=True)
class Shard:
    """An open file."""

    path: Path
    descriptor: int

    def read_into(self, values: Tensor, position: int) -> None:
        """Fill a contiguous tensor of host memory with the bytes from ``position`` on.

        Raises:
            OSError: the file ends before, or cannot be read.
        """
        memory = values.reshape(-1).view(torch.uint8).numpy().data
        while memory:
            count = os.preadv(self.descriptor, [memory[:BLOCK]], position)
            if not count:
                raise OSError(errno.EIO, "ends before a record does", str(self.path))
            memory, position = memory[count:], position + count


@dataclass(frozen=True)
class Stretch:
    """Values in a file: ``values`` has their shape and strides and no memory, and its storage begins at ``start``."""

    shard: Shard
    values: Tensor
    start: int

    def of(self, values: Tensor) -> Stretch:
        """The same storage seen as ``values``."""
        return Stretch(self.shard, values, self.start)

    def read_into(self, target: Tensor) -> None:
        """Fill a tensor of the same shape; what has to be put in another order goes through a buffer of `BLOCK`."""
        values = self.values
        if not values.numel():
            return
        if target.is_contiguous() and values.is_contiguous():
            if target.device.type == "cpu" and target.dtype == values.dtype:
                self.shard.read_into(target, self._position())
                return
            step = BLOCK // values.itemsize
            for mine, theirs in zip(target.view(-1).split(step), values.view(-1).split(step), strict=True):
                self.of(theirs)._copy_into(mine)
        elif self._num_elements() * values.itemsize <= BLOCK:
            self._copy_into(target)
        else:
            for mine, theirs in zip(target.unbind(), values.unbind(), strict=True):
                self.of(theirs).read_into(mine)

    def _position(self) -> int:
        return self.start + int(self.values.storage_offset()) * self.values.itemsize

    def _num_elements(self) -> int:
        """From the first to the last one, with those in between that are not wanted."""
        sizes = zip(self.values.shape, self.values.stride(), strict=True)
        return 1 + sum((size - 1) * stride for size, stride in sizes)

    def _copy_into(self, target: Tensor) -> None:
        count = self._num_elements()
        buffer = torch.empty(count, dtype=self.values.dtype, pin_memory=target.device.type == "cuda")
        self.shard.read_into(buffer, self._position())
        target.copy_(buffer.as_strided(self.values.shape, self.values.stride()))


class ShardReader(FileSystemReader):
    """Torch's reader of a checkpoint's folder with another way to the values of tensors."""

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read what ``plan`` names into the places that ``planner`` gives.

        Raises:
            TypeError: something is stored that is no tensor.
            OSError: a file is missing, cannot be read or is too short.
        """
        wanted = sorted(plan.items, key=self._place)
        if any(item.type is LoadItemType.BYTE_IO for item in wanted):
            raise TypeError(f"{self.path} holds something that is no tensor; it was written by other code")
        targets = [planner.resolve_tensor(item).detach() for item in wanted]
        with ThreadPoolExecutor(THREADS) as pool:
            for _ in pool.map(self._read, wanted, targets):  # the first error comes out here; no other read begins
                pass
        for item, target in zip(wanted, targets, strict=True):
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _place(self, item: ReadItem) -> tuple[str, int]:
        """The file and the offset at which an item's record lies."""
        place = self.storage_data[item.storage_index]
        return place.relative_path, place.offset

    def _read(self, item: ReadItem, target: Tensor) -> None:
        place = self.storage_data[item.storage_index]
        path = Path(self.path) / place.relative_path
        with path.open("rb") as file:
            archive: Any = _create_file_view(file, place.offset, place.length)
            stored = torch.load(archive, map_location="meta", weights_only=True)  # shape, strides and where it lies
            start = place.offset + stored.untyped_storage()._checkpoint_offset
            wanted = narrow_tensor_by_index(stored, item.storage_offsets, item.lengths)
            assert wanted.shape == target.shape, f"{item.storage_index}: {wanted.shape} for {target.shape}"
            Stretch(Shard(path, file.fileno()), wanted, start).read_into(target)
