"""A fake of DeepSpeed's libaio extension that reads and writes plain files, for tensors of any size."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor


class FileHandle:
    """The methods of an aio handle that DeepSpeed's swappers call. `async_…` returns when the transfer is complete."""

    pinned: set[int] = set()  # noqa: RUF012 (of all handles alike, as memory is)

    def __init__(self, **_: Any) -> None:
        self.done = 0

    def new_cpu_locked_tensor(self, numel: int, example: Tensor) -> Tensor:
        return self.pin_device_tensor(torch.empty(numel, dtype=example.dtype))

    def free_cpu_locked_tensor(self, tensor: Tensor) -> bool:
        return True

    def pin_device_tensor(self, tensor: Tensor) -> Tensor:
        self.pinned.add(tensor.untyped_storage().data_ptr())
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def async_pread(self, buffer: Tensor, path: str, offset: int) -> int:
        buffer.view(-1).view(torch.uint8).numpy()[:] = np.fromfile(path, dtype=np.uint8, offset=offset)
        self.done += 1
        return 0

    def async_pwrite(self, buffer: Tensor, path: str, offset: int) -> int:
        assert offset == 0
        buffer.view(-1).view(torch.uint8).numpy().tofile(path)
        self.done += 1
        return 0

    def wait(self) -> int:
        done, self.done = self.done, 0
        return done


def install() -> None:
    """Make DeepSpeed swap through this module in this process."""
    import parallel.deepspeed.engine
    from parallel.deepspeed.setup import deepspeed_settings, quiet_import

    quiet_import("cpu")
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from deepspeed.runtime.swap_tensor import optimizer_utils, partitioned_param_swapper

    AsyncIOBuilder.load = lambda self, verbose=False: SimpleNamespace(aio_handle=FileHandle)
    AsyncIOBuilder.is_compatible = lambda self, verbose=False: True
    optimizer_utils.MIN_AIO_BYTES = partitioned_param_swapper.MIN_AIO_BYTES = 1024  # it leaves less than 1 MB in memory
    aio = {"aio": {"block_size": 1024}}
    parallel.deepspeed.engine.deepspeed_settings = lambda *sizes: deepspeed_settings(*sizes) | aio  # type: ignore[assignment]
