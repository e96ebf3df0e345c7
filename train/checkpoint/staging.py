"""The staging buffer: a copy of a rank's state in host memory, so that training continues while it is written."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, as torch aligns its tensors


def padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


class StagingBuffer:
    """One buffer of host memory, allocated by the first copy and reused by every later one.

    A copy is valid until the next one is made. With a GPU the buffer is page-locked.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory: mmap.mmap | None = None
        self.used = 0

    @property
    def num_bytes(self) -> int:
        return 0 if self.memory is None else len(self.memory)

    def copy(self, gather: Callable[[Callable[[Tensor], Tensor]], Any]) -> Any:
        """``gather(keep)``, which replaces every tensor by ``keep(tensor)``, its copy in the buffer.

        The first time ``gather`` is called twice, once to add up sizes.
        """
        if self.memory is None:
            self._reserve(gather)
        self.used = 0
        copied = gather(self._keep)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return copied

    def _reserve(self, gather: Callable[[Callable[[Tensor], Tensor]], Any]) -> None:
        total = 0

        def count(tensor: Tensor) -> Tensor:
            nonlocal total
            total += padded(tensor.nbytes)
            return tensor

        gather(count)
        self.memory = mmap.mmap(-1, max(total, ALIGNMENT), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory.madvise(mmap.MADV_HUGEPAGE)
        self._lock_pages()

    def _lock_pages(self) -> None:
        """Copies from a GPU reach the full rate only into page-locked memory; torch's own would be twice as large."""
        if self.device.type == "cuda" and self.memory is not None:
            start = torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr()
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(start, len(self.memory), 0)))

    def _keep(self, tensor: Tensor) -> Tensor:
        """A copy whose storage has its size: the writer would copy a view of a larger storage once more."""
        if not tensor.numel():
            return tensor
        assert self.memory is not None and self.used + tensor.nbytes <= len(self.memory), "the state has grown"
        target = torch.frombuffer(self.memory, dtype=tensor.dtype, count=tensor.numel(), offset=self.used)
        self.used += padded(tensor.nbytes)
        return target.view(tensor.shape).copy_(tensor.detach(), non_blocking=True)

    def close(self) -> None:
        """Free the memory; it stays mapped while a tensor still uses it."""
        if self.memory is not None and self.device.type == "cuda":
            start = torch.frombuffer(self.memory, dtype=torch.uint8).data_ptr()
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(start)))
        self.memory = None
