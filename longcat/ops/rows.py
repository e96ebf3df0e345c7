"""Rows gathered, summed and weighed in a fixed order: what takes tokens to their experts and back.

An operator with weights multiplies in float32 and adds in the order of a token's selections, from zero on; a weight is
first rounded to the rows' dtype, so that a product of bfloat16 numbers is exact.
"""

# T tokens, K chosen, P rows (FFN selections), D width

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from longcat.ops.fusion import Fusible
from longcat.ops.library import num_partial_sums, operator, sum_halves, sum_into_partials, wide

STRETCH = 1 << 20  # numbers of a stretch of rows that the CPU works through at once: its copies stay in the cache
TAIL = 32  # lanes from which on halves are narrower than what a processor adds well

with warnings.catch_warnings():  # torch says once in a process that compressed sparse tensors are young
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], torch.empty(0, dtype=torch.int64), torch.empty(0), (1, 1))


def stretches(like: Tensor) -> Iterator[slice]:
    """Stretches of the rows of ``like`` [R, D]; one of all rows where there is no cache to think of."""
    num_rows, width = like.shape
    step = max(1, STRETCH // max(width, 1)) if like.device.type == "cpu" else max(num_rows, 1)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def _sums(rows: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    """For each token the sum of its (weighted) rows in the order of its selections, rounded once: [T, D]."""
    flat = place.reshape(-1)
    chosen = flat >= 0
    row = flat[chosen]
    ends = chosen.view(place.shape).sum(1).cumsum(0)
    if row.shape[0] == 0:
        return rows.new_zeros(place.shape[0], rows.shape[1])
    weight = None if weights is None else weights.reshape(-1)[chosen].to(rows.dtype)
    if rows.element_size() == 2 and rows.device.type == "cpu":
        # embedding_bag rounds ties of bfloat16 away from zero; the sparse product rounds as every other operator
        values = torch.ones(row.shape, dtype=rows.dtype) if weight is None else weight
        sparse = torch.sparse_csr_tensor(pad(ends, (1, 0)), row, values, (place.shape[0], rows.shape[0]))
        return torch.ops.aten._sparse_mm_reduce_impl(sparse, rows, "sum")[0]  # type: ignore[no-any-return]
    values = rows.to(wide(rows.dtype))
    if weight is not None:  # multiplied first: embedding_bag would not round the products
        of_row = values.new_zeros(values.shape[0]).scatter_(0, row, weight.to(values.dtype))
        values = values * of_row[:, None]
    first = pad(ends, (1, 0))[:-1]
    return embedding_bag(row, values, first, mode="sum").to(rows.dtype)


def _identity_gates(gates: Tensor, place: Tensor) -> Tensor:
    """Each token's gates of identity experts, summed by halves: [T, 1]."""
    top_k = gates.shape[1]
    masked = gates.masked_fill(place >= 0, 0.0)
    return sum_halves(pad(masked, (0, (1 << (top_k - 1).bit_length()) - top_k)))


@Fusible
def _add_share(out: Tensor, x: Tensor, gate: Tensor) -> None:
    """Add gate [r, 1] · x [r, D] to ``out`` [r, D], rounded once."""
    out.copy_(x * gate + out)


def _partials(like: Tensor) -> Tensor:
    """Room for sums of products of the rows of ``like`` [R, D], as `_weigh` leaves them."""
    return like.new_empty(like.shape[0], min(TAIL, num_partial_sums(like.shape[1])), dtype=wide(like.dtype))


@Fusible
def _weigh(
    grad: Tensor, token: Tensor | None, rows: Tensor, weight: Tensor, grad_rows: Tensor, partials: Tensor
) -> None:
    """Gradients of r rows [r, D] and, summed onto lanes, their products with ``grad``: into the last two arguments.

    ``grad`` [r, D], or [T, D] with the ``token`` [r] of each row; ``weight`` [r, 1].
    """
    slope = grad if token is None else grad.index_select(0, token)
    torch.mul(slope, weight, out=grad_rows)
    product = rows.to(partials.dtype) * slope
    partials.copy_(sum_halves(sum_into_partials(product), partials.shape[1]))


def _sum_partials(partials: Tensor) -> Tensor:
    """lanes [R, n] → [R]; no negative zero, as of sums that begin with zero."""
    return sum_halves(partials)[:, 0] + 0.0


@operator("gather_rows(Tensor source, Tensor index) -> Tensor")
def gather_rows(source: Tensor, index: Tensor) -> Tensor:
    """source [S, D], index [P] → rows [P, D]."""
    return source.index_select(0, index)


@operator("sum_rows(Tensor rows, Tensor place) -> Tensor")
def sum_rows(rows: Tensor, place: Tensor) -> Tensor:
    """rows [P, D], place [T, K] (a row, or -1) → for each token the sum of its rows [T, D]."""
    return _sums(rows, place, None)


@operator("combine_rows(Tensor rows, Tensor gates, Tensor place, Tensor? x) -> Tensor")
def combine_rows(rows: Tensor, gates: Tensor, place: Tensor, x: Tensor | None) -> Tensor:
    """rows [P, D], gates and place [T, K], x [T, D] → Σ gate · row, rounded, + Σ of the other gates · x, rounded.

    Without ``x`` the second sum is left out.
    """
    out = _sums(rows, place, gates)
    if x is not None:
        identity = _identity_gates(gates, place)
        for part in stretches(x):
            _add_share(out[part], x[part], identity[part])
    return out


@operator(
    "combine_rows_backward(Tensor grad, Tensor rows, Tensor gates, Tensor token, Tensor selection, Tensor place, "
    "Tensor? x) -> (Tensor, Tensor, Tensor)"
)
def combine_rows_backward(
    grad: Tensor, rows: Tensor, gates: Tensor, token: Tensor, selection: Tensor, place: Tensor, x: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [T, D] → the gradients by rows [P, D], gates [T, K] and x [T, D] (no elements without ``x``).

    A gate's gradient is the product of two rows, summed onto lanes and by halves. A row of nobody (its token and
    selection are -1) gets zeros.
    """
    token = token.clamp_min(0)
    weight = pad(gates.reshape(-1), (0, 1))[selection].to(rows.dtype)[:, None]  # -1, a row of nobody: zero
    grad_rows, partials = torch.empty_like(rows), _partials(rows)
    for part in stretches(rows):
        _weigh(grad, token[part], rows[part], weight[part], grad_rows[part], partials[part])
    of_row, of_token = _sum_partials(partials).to(gates.dtype), gates.new_zeros(gates.shape[0], 1)
    grad_x = grad.new_empty(0)
    if x is not None:
        identity, grad_x, partials = _identity_gates(gates, place), torch.empty_like(x), _partials(x)
        for part in stretches(x):
            _weigh(grad[part], None, x[part], identity[part], grad_x[part], partials[part])
        of_token = _sum_partials(partials).to(gates.dtype)[:, None]
    grad_gates = pad(torch.where(place >= 0, 0.0, of_token).reshape(-1), (0, 1))
    grad_gates[selection] = of_row
    return grad_rows, grad_gates[:-1].view_as(gates), grad_x
