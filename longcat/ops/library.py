"""The operators that have a kernel of their own on a GPU, as one library of torch's dispatcher.

An operator is declared here with its plain version in torch, which runs on every device. `parallel/kernels` puts
Triton kernels beside it for CUDA tensors. Both compute the same bits: sums have one order, which the plain versions say
in words, products are rounded before they are added, and nothing is added by an atomic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

NAME = "longcat"
_LIBRARY = torch.library.Library(NAME, "DEF")
PARTIAL_SUMS = 256  # columns that are summed side by side in the product of two rows


def operator(schema: str) -> Callable[[Callable[..., Any]], Any]:
    """Declare an operator by its schema, ``name(Tensor a, ...) -> ...``; the decorated function is its plain version.

    The name then stands for the operator. It has no gradient: autograd functions call it in both directions.
    """

    def declare(plain: Callable[..., Any]) -> Any:
        name = _LIBRARY.define(schema)
        _LIBRARY.impl(name, plain, "CompositeExplicitAutograd")
        return getattr(getattr(torch.ops, NAME), name).default

    return declare


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums of ``dtype`` are taken in."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def num_partial_sums(width: int) -> int:
    """Lanes for rows of ``width`` numbers: LANES, or the next power of two where a row is shorter."""
    return min(PARTIAL_SUMS, 1 << (width - 1).bit_length())


def sum_halves(values: Tensor, stop: int = 1) -> Tensor:
    """values [R, 2^n] → [R, stop]: the second half is added to the first until ``stop`` are left."""
    while values.shape[1] > stop:
        first, second = values.chunk(2, 1)
        values = first + second
    return values


def sum_into_partials(values: Tensor) -> Tensor:
    """values [R, D] → [R, lanes]: blocks of columns are added one after the other."""
    size = num_partial_sums(values.shape[1])
    partials, *others = pad(values, (0, -values.shape[1] % size)).split(size, 1)
    for block in others:
        partials = partials + block
    return partials
