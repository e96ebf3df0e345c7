"""Computations that a compiler may fuse: runs of elementwise steps and row sums, between tensors and without autograd.

Each is written once and works eagerly. `fuse` has torch.compile make one pass over memory of each, for the whole
process; what calls them does not change, so fusing goes with every layout, schedule and recomputation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import update_wrapper
from typing import Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
VARIANTS = 64  # of one function: dtypes, numbers of dimensions, sizes of one; the compiler gives up after 8
_FUSIBLE: list[Fusible] = []  # type: ignore[type-arg]


class Fusible(Generic[P, R]):
    """A function of tensors that runs as written or fused."""

    def __init__(self, function: Callable[P, R]) -> None:
        self.function = self.run = function
        self.fused: Callable[P, R] | None = None  # made where it is first asked for: the compiler takes long to import
        update_wrapper(self, function)
        _FUSIBLE.append(self)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.run(*args, **kwargs)

    def fuse(self, enabled: bool) -> None:
        if enabled and self.fused is None:
            torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
            self.fused = torch.compile(self.function, fullgraph=True, dynamic=True)
        self.run = self.fused if enabled and self.fused else self.function


def fuse(enabled: bool) -> None:
    """Let everything fusible run fused from now on, or as written. A first call compiles, which takes a second or more.

    Fused results differ from unfused ones by rounding: sums over a row take another order.
    """
    for one in _FUSIBLE:
        one.fuse(enabled)


@Fusible
def add_to(total: Tensor, part: Tensor) -> None:
    """Add in place, in the dtype of ``total``."""
    total += part


@Fusible
def scaled(x: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """x · factor, rounded to ``dtype``."""
    return (x * factor).to(dtype)
