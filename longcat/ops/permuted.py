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
    """x with a dimension rolled by `distance`, or ``back``, in the same memory layout."""
    by = distance(x.shape[dim])
    if not by:
        return x
    by = -by if back else by
    if x.dim() >= 2 and x.stride(-1) != 1 and x.stride(-2) == 1:  # a transposed matrix: the kernel depends on it
        dim = dim % x.dim()
        last = x.dim() - 1
        return x.mT.roll(by, {last: last - 1, last - 1: last}.get(dim, dim)).mT
    return x.roll(by, dim)


def along(dim: int, function: Callable[..., Any], *operands: Tensor) -> Any:
    """``function`` of operands that are all rolled along ``dim``, with its result or results rolled back."""
    out = function(*(rolled(x, dim) for x in operands))
    return rolled(out, dim, back=True) if isinstance(out, Tensor) else tuple(rolled(x, dim, back=True) for x in out)


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b, into ``out`` if given; while permuting, of rolled rows of a, columns of b, and matrices of a batch."""
    if not _permuting:
        return passed(Place.product, "product", torch.matmul(a, b) if out is None else torch.matmul(a, b, out=out))
    rows, columns = can_roll(a, b)
    batch = a.dim() == b.dim() == 3
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
    with a rest of columns, use other code for them, with another order of sums.
    """
    if a.device.type != "cpu" or a.dtype is torch.bfloat16:
        return True, True
    whole = b.shape[-1] % COLUMNS == 0
    return whole and a.shape[-2] >= MIN_ROWS, whole
