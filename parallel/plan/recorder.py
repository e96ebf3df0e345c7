"""Records what tensors would allocate under FakeTensorMode: bytes that live now, the peak, and their kinds then."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class AllocationRecorder(TorchDispatchMode):
    """Counts every storage that an operator returns, from then until nothing refers to it.

    Sizes are those that tensors ask for. An allocator that rounds up, or caches what was freed, takes more. FSDP2
    frees gathered weights by resizing their storage to zero, which no operator shows: see `watch_resizing`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = "state"  # of what is allocated from now on
        self._ignoring = 0
        self.now, self.peak = 0, 0
        self.by_kind: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {}
        self._live: dict[int, tuple[int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls the operator on its shard, which comes here again
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and not isinstance(leaf, DTensor):
                self._see(leaf)
        return out

    def _see(self, tensor: Tensor) -> None:
        if self._ignoring or tensor.device.type == "meta" or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._live:
            self.resized(storage)
            return
        self._live[key] = size, self.kind
        self._change(size, self.kind)
        weakref.finalize(storage, self._freed, key)

    def ignore(self) -> None:
        """Count nothing new until `count_again`; may be nested."""
        self._ignoring += 1

    def count_again(self) -> None:
        self._ignoring -= 1

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Count a storage's size anew, if it is one of those that are counted."""
        if storage._cdata in self._live:
            old, kind = self._live[storage._cdata]
            self._live[storage._cdata] = storage.nbytes(), kind
            self._change(storage.nbytes() - old, kind)

    def _freed(self, key: int) -> None:
        size, kind = self._live.pop(key)
        self._change(-size, kind)

    def _change(self, size: int, kind: str) -> None:
        self.now += size
        self.by_kind[kind] += size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self.by_kind)


@contextmanager
def watch_resizing(recorder: AllocationRecorder) -> Iterator[None]:
    """Tell the recorder of every `UntypedStorage.resize_`."""
    plain = torch.UntypedStorage.resize_

    def resize(self: torch.UntypedStorage, size: int) -> Any:
        out = plain(self, size)
        recorder.resized(self)
        return out

    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = plain  # type: ignore[method-assign]
