"""Tensors read from torch.distributed.checkpoint's shards straight into their memory, by several threads.

A shard is a sequence of records, each a tensor as torch.save writes it: an archive with the values in one uncompressed
range. Torch's own reader copies a record into a buffer, makes a tensor of that and copies it again. This one decodes
only the archive's index and reads the values from the file straight into the target tensor.
"""

from __future__ import annotations

import errno
import itertools
import os
import pickle
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorProperties
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem
from torch.futures import Future

from longcat.garbage import no_collections
from parallel.torch_internals import file_view, narrow_tensor_by_index, offset_in_archive

METADATA = ".metadata"  # torch's name of a checkpoint's list of tensors
BLOCK = 1 << 24  # bytes of one read, and of a thread's buffer for values that need a copy
PART = 1 << 26  # bytes of one task of a thread
THREADS = min(4, os.cpu_count() or 1)
HEADER = 1 << 12  # bytes; headers of records were at most a quarter of this


@dataclass(frozen=True)
class ShardFile:
    """An open shard."""

    path: Path
    descriptor: int

    def read_into(self, values: Tensor, position: int) -> None:
        """Fill a contiguous tensor in host memory with the bytes from ``position`` on.

        Raises:
            OSError: the file is too short or cannot be read.
        """
        memory = values.as_strided((values.numel(),), (1,)).view(torch.uint8).numpy().data
        while memory:
            count = os.preadv(self.descriptor, [memory[:BLOCK]], position)
            if not count:
                raise OSError(errno.EIO, "ends before a record does", str(self.path))
            memory, position = memory[count:], position + count


@dataclass(frozen=True)
class FileRange:
    """Values in a file: ``values`` (meta) has their shape and strides; its storage begins at byte ``start``."""

    shard: ShardFile
    values: Tensor
    start: int

    def of(self, values: Tensor) -> FileRange:
        """The same storage viewed as ``values``."""
        return FileRange(self.shard, values, self.start)

    def read_into(self, target: Tensor) -> None:
        """Fill a tensor of the same shape; values to convert or reorder pass through a buffer of `BLOCK`."""
        values = self.values
        if not values.numel():
            return
        if target.is_contiguous() and values.is_contiguous():
            if target.device.type == "cpu" and target.dtype == values.dtype:
                self.shard.read_into(target, self._position())
                return
            step = BLOCK // values.itemsize
            for part, stored in zip(target.view(-1).split(step), values.view(-1).split(step), strict=True):
                self.of(stored)._copy_into(part)
        elif self._num_elements() * values.itemsize <= BLOCK:
            self._copy_into(target)
        else:
            for part, stored in zip(target.unbind(), values.unbind(), strict=True):
                self.of(stored).read_into(part)

    def _position(self) -> int:
        return self.start + int(self.values.storage_offset()) * self.values.itemsize

    def _num_elements(self) -> int:
        """The number from the first value to the last, including those between them."""
        sizes = zip(self.values.shape, self.values.stride(), strict=True)
        return 1 + sum((size - 1) * stride for size, stride in sizes)

    def _copy_into(self, target: Tensor) -> None:
        count = self._num_elements()
        buffer = torch.empty(count, dtype=self.values.dtype, pin_memory=target.device.type == "cuda")
        self.shard.read_into(buffer, self._position())
        target.copy_(buffer.as_strided(self.values.shape, self.values.stride()))


class KnownProperties(TensorProperties):
    """Properties of a stored tensor, of those that this torch knows: 2.15 stores one more than 2.13 and 2.14."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        super().__setstate__(state[: len(TensorProperties().__getstate__())])
        cast(Any, self).__class__ = TensorProperties  # growth stores it again, for readers without this package


class MetadataUnpickler(pickle.Unpickler):
    """Reads the metadata of a checkpoint that a newer torch or a newer Python wrote."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class("pathlib" if module == "pathlib._local" else module, name)  # Python 3.13's paths
        return KnownProperties if found is TensorProperties else found


class ShardReader(FileSystemReader):
    """Torch's reader of a checkpoint folder, with faster reading of tensors, for checkpoints of newer torch as well."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The list of stored tensors and of their places.

        Raises:
            OSError: the file cannot be read.
        """
        with (Path(self.path) / METADATA).open("rb") as file, no_collections():
            metadata: Metadata = MetadataUnpickler(file).load()
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read the items of ``plan`` into the tensors that ``planner`` gives.

        Raises:
            TypeError: an item is not a tensor.
            OSError: a file is missing, cannot be read or is too short.
        """
        if any(item.type is LoadItemType.BYTE_IO for item in plan.items):
            raise TypeError(f"{self.path} contains an item that is not a tensor; other code wrote it")
        requests = [
            ReadRequest(item, self.storage_data[item.storage_index], planner.resolve_tensor(item))
            for item in plan.items
        ]
        headers = RecordHeaders()
        with ThreadPoolExecutor(THREADS) as pool:
            reads = [pool.submit(read_part, Path(self.path) / name, part, headers) for name, part in parts(requests)]
            try:
                for one in reads:
                    one.result()
            finally:
                pool.shutdown(cancel_futures=True)  # after an error no further read starts
        for request in requests:
            planner.commit_tensor(request.item, request.target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


@dataclass(frozen=True)
class ReadRequest:
    """A stored tensor or a box of one, the location of its record, and the tensor that it is read into."""

    item: ReadItem
    location: Any  # relative_path, offset and length of the record
    target: Tensor


def parts(requests: list[ReadRequest]) -> Iterator[tuple[str, list[ReadRequest]]]:
    """(file, consecutive requests in it of `PART` bytes or a little more)."""
    in_order = sorted(requests, key=lambda one: (one.location.relative_path, one.location.offset))
    for name, in_file in itertools.groupby(in_order, key=lambda one: str(one.location.relative_path)):
        part: list[ReadRequest] = []
        size = 0
        for request in in_file:
            part.append(request)
            size += request.target.nbytes
            if size >= PART:
                yield name, part
                part, size = [], 0
        if part:
            yield name, part


def read_part(path: Path, requests: list[ReadRequest], headers: RecordHeaders) -> None:
    with path.open("rb", buffering=0) as file:
        shard = ShardFile(path, file.fileno())
        for request in requests:
            item, stored = request.item, headers.of(file, request.location)
            values = narrow_tensor_by_index(stored, item.storage_offsets, item.lengths)
            target = request.target.detach()
            assert values.shape == target.shape, f"{item.storage_index}: {values.shape} for {target.shape}"
            start = request.location.offset + offset_in_archive(stored)
            FileRange(shard, values, start).read_into(target)


class RecordHeaders:
    """Headers of records, each distinct one decoded once.

    A model has few shapes and many layers, and decoding an archive takes as long as reading a MiB.
    """

    def __init__(self) -> None:
        self.known: dict[int, list[tuple[bytes, Tensor]]] = defaultdict(list)  # length of the record → headers

    def of(self, file: Any, location: Any) -> Tensor:
        """A meta tensor of a record's shape, strides and dtype; its storage knows its offset in the record."""
        begin = os.pread(file.fileno(), min(HEADER, location.length), location.offset)
        for header, stored in self.known[location.length]:
            if begin.startswith(header):
                return stored
        archive = file_view(file, location.offset, location.length)
        found: Tensor = torch.load(archive, map_location="meta", weights_only=True)
        offset = offset_in_archive(found)
        if offset <= len(begin):
            self.known[location.length].append((begin[:offset], found))
        return found
