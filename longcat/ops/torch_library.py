"""The operators that have a Triton kernel on GPUs, as one library of torch's dispatcher, and the order of their sums.

An operator is declared with a plain version in torch, which runs on every device. `parallel/kernels` registers Triton
kernels for CUDA tensors. Both are bitwise identical: sums have one documented order, products are rounded before they
are added, and no sum uses atomics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

NAME = "longcat"
PLAIN: dict[Any, Callable[..., Any]] = {}  # the plain version of each operator
_LIBRARY = torch.library.Library(NAME, "DEF")
PARTIAL_SUMS = 256  # partial sums that the dot product of two rows accumulates side by side, before a tree sum


def operator(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Declare an operator by its schema, ``name(Tensor a, ...) -> ...``; the decorated function is its plain version.

    The decorated name becomes the operator. It has no gradient: autograd functions call it in forward and backward.
    """

    def declare(plain: Callable[..., Any]) -> Any:
        name = _LIBRARY.define(schema)
        _LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
        declared = getattr(getattr(torch.ops, NAME), name).default
        PLAIN[declared] = plain
        return declared

    return declare


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of ``dtype`` are accumulated."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def num_partial_sums(width: int) -> int:
    """Partial sums for rows of ``width`` numbers: PARTIAL_SUMS, or the next power of two where a row is shorter."""
    return min(PARTIAL_SUMS, 1 << (width - 1).bit_length())


def tree_sum(values: Tensor, stop: int = 1) -> Tensor:
    """values [R, 2^n] → [R, stop]: add the second half of the columns to the first until ``stop`` are left."""
    while values.shape[1] > stop:
        first, second = values.chunk(2, 1)
        values = first + second
    return values


def sum_into_partials(values: Tensor) -> Tensor:
    """values [R, D] → [R, `num_partial_sums`]: blocks of columns are added in order."""
    size = num_partial_sums(values.shape[1])
    partials, *others = pad(values, (0, -values.shape[1] % size)).split(size, 1)
    for block in others:
        partials = partials + block
    return partials
