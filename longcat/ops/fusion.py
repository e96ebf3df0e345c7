"""Computations that a compiler may fuse: chains of elementwise operations and row sums, outside autograd.

Each is written once and works eagerly. `fuse` lets torch.compile turn each into one pass over memory, for the whole
process; their callers do not change, so fusing works with every layout, schedule and kind of recomputation. Those that
have an operator with a kernel of its own on GPUs (`one_pass.py`) run it there, compiled or not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from longcat.faults import Place, is_active, passed_all
from longcat.ops.permuted import can_permute, is_permuting
from longcat.ops.torch_internals import allow_recompilations

P = ParamSpec("P")
R = TypeVar("R")
VARIANTS = 64  # compilations of one function (dtypes, numbers of dimensions, sizes of 1); the default limit is 8
_FUSIBLE: list[Fusible[..., Any]] = []


def is_on_gpu(x: Tensor) -> bool:
    """Whether operators for GPUs run on x; the meta device counts as one."""
    return x.device.type != "cpu"


class Permutable(Generic[P, R]):
    """A chain of elementwise operations and row sums that may be repeated from permuted operands."""

    def __init__(self, function: Callable[P, R]) -> None:
        self.function = self.run = function
        self.permuted: Callable[P, R] | None = None  # another way to the same bits, see `permuted.py`
        update_wrapper(self, function)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.permuted is not None and is_permuting() and can_permute(args[0]):  # type: ignore[arg-type]
            return self.permuted(*args, **kwargs)
        return self.compute(*args, **kwargs)

    def compute(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run it; a fault may be injected into the results as they were written."""
        out = self._run_for(args[0])(*args, **kwargs)  # type: ignore[arg-type]
        if is_active() and out is not None:
            passed_all(Place.elementwise, self.function.__name__, out if isinstance(out, tuple) else (out,))
        return out

    def permuted_by(self, permuted: Callable[P, R]) -> Callable[P, R]:
        """Decorates the function that computes the same bits from permuted operands."""
        self.permuted = permuted
        return permuted

    def _run_for(self, _: Tensor) -> Callable[P, R]:
        return self.run


class Fusible(Permutable[P, R]):
    """A `Permutable` that runs eagerly or fused, on GPUs perhaps by an operator with a kernel of its own."""

    def __init__(self, function: Callable[P, R]) -> None:
        super().__init__(function)
        self.on_gpu: Callable[P, R] | None = None
        self.fused: Callable[P, R] | None = None  # created at first use: the compiler takes long to import
        _FUSIBLE.append(self)

    def _run_for(self, x: Tensor) -> Callable[P, R]:
        return self.run if self.on_gpu is None or not is_on_gpu(x) else self.on_gpu

    def on_gpu_by(self, on_gpu: Callable[P, R]) -> Callable[P, R]:
        """Decorates the function that runs on GPUs instead."""
        self.on_gpu = on_gpu
        return on_gpu

    def fuse(self, enabled: bool) -> None:
        if enabled and self.fused is None:
            allow_recompilations(VARIANTS)
            self.fused = torch.compile(self.function, fullgraph=True, dynamic=True)
        self.run = self.fused if enabled and self.fused else self.function


def fuse(enabled: bool) -> None:
    """Let every `Fusible` run fused from now on, or eagerly. A first call compiles, which takes a second or more.

    Fused results differ from eager ones by rounding: sums over a row have another order.
    """
    if enabled:  # tells the compiler too, which may not have been imported yet
        torch.use_deterministic_algorithms(
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )
    for fusible in _FUSIBLE:
        fusible.fuse(enabled)


@Fusible
def add_to(total: Tensor, part: Tensor) -> None:
    """Add in place, in the dtype of ``total``."""
    total += part


@Fusible
def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x · factor, rounded to ``dtype``."""
    return (x * factor).to(dtype)
