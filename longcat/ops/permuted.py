"""A second way to the same bits: operands permuted, results permuted back.

A defective unit that repeats its mistake gives the same wrong result when the same call is repeated. With the rows and
columns of the operands rolled, each number of the result is computed elsewhere: by another lane, tile or core. The
sums keep their order, so on sound hardware the results are bitwise equal, and `tests/longcat/test_permuted.py` checks
that for all shapes in use. `parallel/sdc/recompute.py` runs operators a second time within `permuting`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longcat.faults import Place, passed

# float32 products of a CPU: these many rows and multiples of columns are computed by the same code wherever they are
MIN_ROWS, COLUMNS = 16, 16
VECTOR = 128  # bytes that a loop takes at once, at most; the rest is scalar code, whose exp rounds differently
SPLIT = 1 << 15  # elements from which on torch divides an operation among threads, anywhere in a row

_permuting = False


@contextmanager
def permuting() -> Iterator[None]:
    """Operators that are called meanwhile compute their results from permuted operands."""
    global _permuting
    _permuting = True
    try:
        yield
    finally:
        _permuting = False


def is_permuting() -> bool:
    return _permuting


def distance(size: int) -> int:
    """By how much a dimension is rolled: about half, and odd, so that nothing returns to its lane of a vector unit."""
    return (size // 2) | 1 if size > 1 else 0


def rolled(x: Tensor, dim: int, back: bool = False) -> Tensor:
    """x with a dimension rolled by `distance`, or ``back``, with the same strides: kernels differ by them."""
    size = x.shape[dim]
    by = distance(size)
    if not by:
        return x
    if 0 in x.stride():  # an expanded tensor
        return x.roll(-by if back else by, dim)
    cut = by if back else size - by
    out = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    out.narrow(dim, 0, size - cut).copy_(x.narrow(dim, cut, size - cut))
    out.narrow(dim, size - cut, cut).copy_(x.narrow(dim, 0, cut))
    return out


def mirrored(x: Tensor) -> Tensor:
    """x [..., D] with its columns in reverse within blocks of the largest power of two that divides D; its own inverse.

    A sum by halves (`one_pass.by_halves`) of the columns then adds the same numbers in other places: in each of its
    additions both or none of the operands change places, and sums of two numbers commute.
    """
    block = x.shape[-1] & -x.shape[-1]
    return x.unflatten(-1, (-1, block)).flip(-1).flatten(-2)


def can_permute(x: Tensor) -> bool:
    """Whether elementwise operations on x give the same bits wherever an element is.

    On a CPU they run through all rows of x as one; only the rest behind the last whole vector is scalar code.
    """
    is_alike = x.nbytes % VECTOR == 0 and (torch.get_num_threads() == 1 or x.numel() < SPLIT)
    return x.device.type != "cpu" or is_alike


def along(dim: int, function: Callable[..., Any], *operands: Tensor) -> Any:
    """``function`` of operands that are all rolled along ``dim``, with its result or results rolled back."""
    out = function(*(rolled(x, dim) for x in operands))
    return rolled(out, dim, back=True) if isinstance(out, Tensor) else tuple(rolled(x, dim, back=True) for x in out)


def elementwise(function: Callable[..., Any], *operands: Tensor) -> Any:
    """An elementwise ``function`` of matrices [..., R, C], with rolled rows and, in whole vectors, rolled columns."""
    if operands[0].shape[-1] * operands[0].element_size() % VECTOR:
        return along(-2, function, *operands)
    return along(-2, lambda *rows: along(-1, function, *rows), *operands)


def mm_float32(a: Tensor, b: Tensor, total: Tensor | None = None, in_place: bool = False) -> Tensor:
    """a @ b (+ ``total``, perhaps in place) of bfloat16 or float16 matrices in float32, unrounded: a GPU's product."""
    if _permuting:
        parts = (rolled(a, 0), rolled(b, 1), None if total is None else rolled(rolled(total, 0), 1))
        return rolled(rolled(_mm_float32(*parts), 1, back=True), 0, back=True)
    return passed(Place.product, "product", _mm_float32(a, b, total, in_place))


def _mm_float32(a: Tensor, b: Tensor, total: Tensor | None = None, in_place: bool = False) -> Tensor:
    if total is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.addmm(total, a, b, out_dtype=torch.float32, out=total if in_place else None)


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, into ``out`` if given; while permuting, of rolled rows of a, columns of b, and matrices of a batch."""
    rows, columns = can_roll(a, b) if _permuting else (False, False)
    if not (rows or columns):
        plain = torch.matmul(a, b) if out is None else torch.matmul(a, b, out=out)
        return passed(Place.product, "product", plain)
    batch = a.dim() == b.dim() == 3 and rows
    for dim, rolls in ((0, batch), (-2, rows)):
        a = rolled(a, dim) if rolls else a
    for dim, rolls in ((0, batch), (-1, columns)):
        b = rolled(b, dim) if rolls else b
    result = passed(Place.product, "product", torch.matmul(a, b))
    for dim, rolls in ((0, batch), (-2, rows), (-1, columns)):
        result = rolled(result, dim, back=True) if rolls else result
    return result if out is None else out.copy_(result)


def can_roll(a: Tensor, b: Tensor) -> tuple[bool, bool]:
    """Whether a product's rows and columns may be rolled: its numbers must not depend on where they are computed.

    Measured for torch 2.13's CPU library (docs/decisions/2026-11-28-recomputation.md): float32 products of few rows, or
    with a rest of columns, use other code for them, with another order of sums, and with a rest of columns the bits
    depend even on where in memory the result is. So those are computed as they were.
    """
    if a.device.type != "cpu" or a.dtype is torch.bfloat16:
        return True, True
    whole = b.shape[-1] % COLUMNS == 0
    return whole and a.shape[-2] >= MIN_ROWS, whole
