"""A checkpoint written in a stream: values are made when they are written and freed afterwards."""

from __future__ import annotations

import contextlib
import math
import os
import queue
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from longcat.names import Box
from train.checkpoint.dcp_tensors import DcpTensor

FILE_BYTES = 1 << 30  # of a shard of the checkpoint; each writing thread has as much in memory
MAX_THREADS = 8


class LazyTensor(DcpTensor):
    """A tensor in boxes whose values are made when they are written, and freed afterwards."""

    make: Callable[[Box], Tensor]

    @staticmethod
    def of(
        shape: tuple[int, ...], boxes: list[Box], make: Callable[[Box], Tensor], dtype: torch.dtype = torch.float32
    ) -> LazyTensor:
        empty = [(box, torch.empty([stop - start for start, stop in box], device="meta")) for box in boxes]
        made = DcpTensor.__new__(LazyTensor, shape, empty, dtype)
        assert isinstance(made, LazyTensor)
        made.make = make
        return made

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        sizes = self.boxes[index.offset][0]
        return self.make(tuple((start, start + size) for start, size in zip(index.offset, sizes, strict=True)))


def zeros(box: Box) -> Tensor:
    return torch.zeros([stop - start for start, stop in box])


def write(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write torch's shards and index.

    Raises:
        ConfigError: a tensor of the source is damaged.
        OSError: reading or writing failed.
    """
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException

    with warnings.catch_warnings(), first_error_of_threads(tensors) as errors:
        warnings.simplefilter("ignore")  # torch warns that there are no other ranks
        try:
            dcp.save(tensors, storage_writer=short_files(folder), no_dist=True)
        except CheckpointException as error:  # no Exception; it wraps the error of each rank
            if errors:
                raise errors[0] from error
            cause: BaseException = next(iter(error.failures.values()))[0]
            if not isinstance(cause, OSError) and isinstance(cause.__context__, OSError):
                cause = cause.__context__  # torch's writer hides the OSError of a full disk
            raise cause from error


@contextlib.contextmanager
def first_error_of_threads(tensors: dict[str, Tensor]) -> Iterator[list[Exception]]:
    """Collect what goes wrong while values are made: torch's writer loses the errors of its threads.

    After the first error all threads stop making values, and none prints a traceback.
    """
    errors: list[Exception] = []

    def guarded(make: Callable[[Box], Tensor]) -> Callable[[Box], Tensor]:
        def call(box: Box) -> Tensor:
            if errors:
                raise errors[0]
            try:
                return make(box)
            except Exception as error:
                errors.append(error)
                raise

        return call

    for tensor in tensors.values():
        if isinstance(tensor, LazyTensor):
            tensor.make = guarded(tensor.make)
    plain = threading.excepthook
    threading.excepthook = lambda args: None if args.exc_value in errors else plain(args)
    try:
        yield errors
    finally:
        threading.excepthook = plain


def short_files(folder: Path) -> Any:
    """Torch's writer with many small files, since it frees a file's tensors when the file is complete.

    Raises (when it writes):
        OSError: a thread failed, which torch does not report.
    """
    from torch.distributed.checkpoint import FileSystemWriter

    from parallel.torch_internals import write_checkpoint_files

    class Writer(FileSystemWriter):
        def write_data(self, plan: Any, planner: Any) -> Any:
            files: queue.Queue[Any] = queue.Queue()
            for number, items in enumerate(by_size(plan.items)):
                name = f"{plan.storage_data.prefix}{number}.distcp"
                files.put((self.fs.concat_path(self.path, name), name, items))
            self.thread_count = max(1, min(MAX_THREADS, os.cpu_count() or 1, files.qsize()))
            before = set(threading.enumerate())
            try:
                written = write_checkpoint_files(self, planner, files)
            finally:  # after a failure, stop the other threads before the folder is removed
                with contextlib.suppress(queue.Empty):
                    while True:
                        files.get_nowait()
                for thread in set(threading.enumerate()) - before:
                    thread.join()
            if len(written.value()) != len(plan.items):
                raise OSError(f"{len(plan.items) - len(written.value())} parts of the checkpoint were not written")
            return written

    return Writer(folder)


def by_size(items: list[Any]) -> Iterator[list[Any]]:
    """Groups of consecutive items with FILE_BYTES together, or a little more."""
    group: list[Any] = []
    size = 0
    for item in items:
        group.append(item)
        size += math.prod(item.tensor_data.chunk.sizes) * item.tensor_data.properties.dtype.itemsize
        if size >= FILE_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group
