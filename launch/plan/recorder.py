"""Bytes that are allocated at each moment of a traced step, by kind: a dispatch mode that follows storages."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Counts each storage once, from the operator that makes it until it is freed.

    FSDP2 frees gathered weights by resizing their storage to nothing and keeps the tensor, so `resize_` counts too.
    DTensors have no memory of their own: their local tensors are counted where DTensor runs operators on them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = "state"  # of what is allocated next
        self.now = self.peak = 0
        self.by_kind: Counter[str] = Counter()
        self.at_peak: dict[str, int] = {}
        self._live: dict[int, tuple[int, str]] = {}  # storage → (bytes, kind)
        self._is_paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # DTensor runs the operator on local tensors, which come here
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return out

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage if it is new."""
        if self._is_paused or isinstance(tensor, DTensor) or tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._live:
            self._live[key] = (0, self.kind)
            weakref.finalize(storage, self._freed, key)
        self._resized(key, storage.nbytes())

    @contextmanager
    def hooks(self) -> Iterator[None]:
        """Follow resized storages, and leave out the full shapes on which DTensor tries each new operator once."""
        resize, propagate = torch.UntypedStorage.resize_, ShardingPropagator._propagate_tensor_meta_non_cached

        def counted(storage: Any, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._live:
                self._resized(storage._cdata, size)
            return result

        def uncounted(*args: Any, **options: Any) -> Any:
            before, self._is_paused = self._is_paused, True
            try:
                return propagate(*args, **options)
            finally:
                self._is_paused = before

        with (
            patch.object(torch.UntypedStorage, "resize_", counted),
            patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", uncounted),
        ):
            yield

    def _resized(self, key: int, size: int) -> None:
        before, kind = self._live[key]
        self._live[key] = (size, kind)
        self._add(size - before, kind)

    def _freed(self, key: int) -> None:
        size, kind = self._live.pop(key)
        self._add(-size, kind)

    def _add(self, change: int, kind: str) -> None:
        self.now += change
        self.by_kind[kind] += change
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, dict(self.by_kind)
