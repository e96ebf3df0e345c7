"""Tensors read out of torch.distributed.checkpoint's shards straight into their place, by several threads.

A shard is a row of records, each a tensor as torch.save writes it: an archive in which the values lie in one stretch,
not compressed. Torch's own reader copies a record into a buffer, makes a tensor of that and copies it once more; here
only an archive's index is decoded, and the values go from the file into the memory that wants them.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections import defaultdict
from collections.abc import Iterator
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
PART = 1 << 26  # bytes that a thread reads before it takes up the next ones
THREADS = min(4, os.cpu_count() or 1)
HEAD = 1 << 12  # bytes; no head of a record was seen that is longer than a quarter of that


@dataclass(frozen=True)
class ShardFile:
    """An open file."""

    path: Path
    descriptor: int

    def read_into(self, values: Tensor, position: int) -> None:
        """Fill a contiguous tensor of host memory with the bytes from ``position`` on.

        Raises:
            OSError: the file ends before, or cannot be read.
        """
        memory = values.as_strided((values.numel(),), (1,)).view(torch.uint8).numpy().data
        while memory:
            count = os.preadv(self.descriptor, [memory[:BLOCK]], position)
            if not count:
                raise OSError(errno.EIO, "ends before a record does", str(self.path))
            memory, position = memory[count:], position + count


@dataclass(frozen=True)
class FileRange:
    """Values in a file: ``values`` has their shape and strides and no memory, and its storage begins at ``start``."""

    shard: ShardFile
    values: Tensor
    start: int

    def of(self, values: Tensor) -> FileRange:
        """The same storage seen as ``values``."""
        return FileRange(self.shard, values, self.start)

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
        if any(item.type is LoadItemType.BYTE_IO for item in plan.items):
            raise TypeError(f"{self.path} holds something that is no tensor; it was written by other code")
        wants = [
            ReadRequest(item, self.storage_data[item.storage_index], planner.resolve_tensor(item))
            for item in plan.items
        ]
        heads = RecordHeaders()
        with ThreadPoolExecutor(THREADS) as pool:
            reads = [pool.submit(read_part, Path(self.path) / name, part, heads) for name, part in parts(wants)]
            try:
                for one in reads:
                    one.result()
            finally:
                pool.shutdown(cancel_futures=True)  # after an error no other read begins
        for want in wants:
            planner.commit_tensor(want.item, want.target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


@dataclass(frozen=True)
class ReadRequest:
    """A stored tensor or a box of one, where its record lies, and the memory that it is read into."""

    item: ReadItem
    place: Any  # relative_path, offset and length of the record
    target: Tensor


def parts(wants: list[ReadRequest]) -> Iterator[tuple[str, list[ReadRequest]]]:
    """(file, wants that lie there one after the other, `PART` bytes or a little more)."""
    in_order = sorted(wants, key=lambda want: (want.place.relative_path, want.place.offset))
    for name, of_file in itertools.groupby(in_order, key=lambda want: str(want.place.relative_path)):
        part: list[ReadRequest] = []
        size = 0
        for want in of_file:
            part.append(want)
            size += want.target.nbytes
            if size >= PART:
                yield name, part
                part, size = [], 0
        if part:
            yield name, part


def read_part(path: Path, wants: list[ReadRequest], heads: RecordHeaders) -> None:
    with path.open("rb", buffering=0) as file:
        shard = ShardFile(path, file.fileno())
        for want in wants:
            stored = heads.of(file, want.place)
            values = narrow_tensor_by_index(stored, want.item.storage_offsets, want.item.lengths)
            target = want.target.detach()
            assert values.shape == target.shape, f"{want.item.storage_index}: {values.shape} for {target.shape}"
            start = want.place.offset + stored.untyped_storage()._checkpoint_offset
            FileRange(shard, values, start).read_into(target)


class RecordHeaders:
    """What lies before the values of a record, decoded once for all records in which the same lies there.

    A model has few shapes and many layers, and to decode an archive takes as long as to read a MiB.
    """

    def __init__(self) -> None:
        self.known: dict[int, list[tuple[bytes, Tensor]]] = defaultdict(list)  # length of the record → heads

    def of(self, file: Any, place: Any) -> Tensor:
        """A tensor of a record's shape, strides and type without memory; its storage knows its offset in the record."""
        begin = os.pread(file.fileno(), min(HEAD, place.length), place.offset)
        for head, stored in self.known[place.length]:
            if begin.startswith(head):
                return stored
        archive: Any = _create_file_view(file, place.offset, place.length)
        found: Tensor = torch.load(archive, map_location="meta", weights_only=True)
        offset: Any = found.untyped_storage()._checkpoint_offset
        if offset <= len(begin):
            self.known[place.length].append((begin[:offset], found))
        return found
