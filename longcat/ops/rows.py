"""Gather rows, sum them per token, weighted or not, and the backward: the operators of dispatch and combine.

An operator with weights multiplies in float32 and adds in the order of a token's selections, starting from zero; a
weight is first rounded to the rows' dtype, so that a product of bfloat16 numbers is exact.
"""

# T tokens, K chosen, P rows (FFN selections), D width

from __future__ import annotations

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from longcat.ops.fusion import Fusible, Permutable
from longcat.ops.permuted import along
from longcat.ops.torch_internals import sparse_row_sums
from longcat.ops.torch_library import accumulate_dtype, num_partial_sums, operator, sum_into_partials, tree_sum

CHUNK_ELEMENTS = 1 << 20  # of a chunk of rows on the CPU: its temporaries stay in the cache
MIN_VECTOR_WIDTH = 32  # partial sums per row: a tree sum of fewer columns uses a CPU's vector units badly

with warnings.catch_warnings():  # torch warns once per process that compressed sparse tensors are in beta
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], torch.empty(0, dtype=torch.int64), torch.empty(0), (1, 1))


def row_chunks(like: Tensor) -> Iterator[slice]:
    """Chunks of the rows of ``like`` [R, D] that fit a CPU's cache; one chunk on a GPU."""
    num_rows, width = like.shape
    step = max(1, CHUNK_ELEMENTS // max(width, 1)) if like.device.type == "cpu" else max(num_rows, 1)
    return (slice(start, start + step) for start in range(0, num_rows, step))


def _sum_rows(rows: Tensor, row_index: Tensor, weights: Tensor | None) -> Tensor:
    """For each token the sum of its (weighted) rows in the order of its selections, rounded once: [T, D]."""
    flat = row_index.reshape(-1)
    chosen = flat >= 0
    row = flat[chosen]
    ends = chosen.view(row_index.shape).sum(1).cumsum(0)
    if row.shape[0] == 0:
        return rows.new_zeros(row_index.shape[0], rows.shape[1])
    weight = None if weights is None else weights.reshape(-1)[chosen].to(rows.dtype)
    if rows.element_size() == 2 and rows.device.type == "cpu":
        # embedding_bag rounds ties of bfloat16 away from zero; the sparse product rounds as every other operator
        values = torch.ones(row.shape, dtype=rows.dtype) if weight is None else weight
        sparse = torch.sparse_csr_tensor(pad(ends, (1, 0)), row, values, (row_index.shape[0], rows.shape[0]))
        return sparse_row_sums(sparse, rows)
    values = rows.to(accumulate_dtype(rows.dtype))
    if weight is not None:  # multiplied first: embedding_bag would not round the products
        weight_of_row = values.new_zeros(values.shape[0]).scatter_(0, row, weight.to(values.dtype))
        values = values * weight_of_row[:, None]
    first = pad(ends, (1, 0))[:-1]
    return embedding_bag(row, values, first, mode="sum").to(rows.dtype)


def _identity_gates(gates: Tensor, row_index: Tensor) -> Tensor:
    """Each token's tree sum of the gates of its identity experts: [T, 1]."""
    top_k = gates.shape[1]
    masked = gates.masked_fill(row_index >= 0, 0.0)
    return tree_sum(pad(masked, (0, (1 << (top_k - 1).bit_length()) - top_k)))


@Fusible
def _add_identity(out: Tensor, x: Tensor, gate: Tensor) -> None:
    """Add gate [r, 1] · x [r, D] to ``out`` [r, D], rounded once."""
    out.copy_(x * gate + out)


def _partials(like: Tensor) -> Tensor:
    """A buffer for the partial sums of each row's dot product, for rows ``like`` [R, D]."""
    num_partials = min(MIN_VECTOR_WIDTH, num_partial_sums(like.shape[1]))
    return like.new_empty(like.shape[0], num_partials, dtype=accumulate_dtype(like.dtype))


@Fusible
def _add_products(a: Tensor, b: Tensor, partials: Tensor) -> None:
    """Write partial sums of the products of a and b [r, D] to ``partials`` [r, n]."""
    partials.copy_(tree_sum(sum_into_partials(a.to(partials.dtype) * b), partials.shape[1]))


@Fusible
def _weighted(grad: Tensor, token: Tensor | None, weight: Tensor, out: Tensor) -> None:
    """Write weight [r, 1] · ``grad`` [r, D], or [T, D] with the ``token`` [r] of each row, to ``out`` [r, D]."""
    torch.mul(grad if token is None else grad.index_select(0, token), weight, out=out)


def _sum_partials(partials: Tensor) -> Tensor:
    """partials [R, n] → [R]; never -0.0, like a sum that starts from zero."""
    return tree_sum(partials)[:, 0] + 0.0


@operator("gather_rows(Tensor source, Tensor index) -> Tensor")
def gather_rows(source: Tensor, index: Tensor) -> Tensor:
    """source [S, D], index [P] → rows [P, D]."""
    return source.index_select(0, index)


@operator("sum_rows(Tensor rows, Tensor row_index) -> Tensor")
def sum_rows(rows: Tensor, row_index: Tensor) -> Tensor:
    """rows [P, D], row_index [T, K] (a row, or -1) → for each token the sum of its rows [T, D]."""
    return _sum_rows(rows, row_index, None)


@operator("combine_rows(Tensor rows, Tensor gates, Tensor row_index, Tensor? x) -> Tensor")
def combine_rows(rows: Tensor, gates: Tensor, row_index: Tensor, x: Tensor | None) -> Tensor:
    """rows [P, D], gates and row_index [T, K], x [T, D] → Σ gate · row, rounded, + Σ of the other gates · x, rounded.

    Without ``x`` the second sum is left out.
    """
    out = _sum_rows(rows, row_index, gates)
    if x is not None:
        identity = _identity_gates(gates, row_index)
        for part in row_chunks(x):
            _add_identity(out[part], x[part], identity[part])
    return out


@operator(
    "combine_rows_backward(Tensor grad, Tensor gates, Tensor token, Tensor selection, Tensor row_index, Tensor? x) -> "
    "(Tensor, Tensor, Tensor)"
)
def combine_rows_backward(
    grad: Tensor, gates: Tensor, token: Tensor, selection: Tensor, row_index: Tensor, x: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [T, D] → the gradients of rows [P, D], gates [T, K] and x [T, D] (no elements without ``x``).

    Of the gates, only those of identity experts get one, the dot product of two rows; the others zero. A padding row
    (token and selection are -1) gets zeros.
    """
    token = token.clamp_min(0)
    weight = pad(gates.reshape(-1), (0, 1))[selection].to(grad.dtype)[:, None]  # -1, a padding row: zero
    grad_rows = grad.new_empty(token.shape[0], grad.shape[1])
    for part in row_chunks(grad_rows):
        _weighted(grad, token[part], weight[part], grad_rows[part])
    if x is None:
        return grad_rows, torch.zeros_like(gates), grad.new_empty(0)
    identity, grad_x = _identity_gates(gates, row_index), torch.empty_like(x)
    for part in row_chunks(x):
        _weighted(grad[part], None, identity[part], grad_x[part])
    gate_grad = dot_rows(grad, x).to(gates.dtype)[:, None]
    return grad_rows, torch.where(row_index >= 0, 0.0, gate_grad), grad_x


@operator("dot_rows(Tensor a, Tensor b) -> Tensor")
def dot_rows(a: Tensor, b: Tensor) -> Tensor:
    """a, b [R, D] → the dot product of each pair of rows [R], float32: partial sums, then their tree sum."""
    partials = _partials(a)
    for part in row_chunks(a):
        _add_products(a[part], b[part], partials[part])
    return _sum_partials(partials)


@Permutable
def row_products(a: Tensor, b: Tensor) -> Tensor:
    """`dot_rows`, called inside autograd functions."""
    return dot_rows(a, b)  # type: ignore[no-any-return]


@row_products.permuted_by
def _row_products_permuted(a: Tensor, b: Tensor) -> Tensor:
    """The sums over a row keep their order."""
    return along(0, row_products.compute, a, b)  # type: ignore[no-any-return]
