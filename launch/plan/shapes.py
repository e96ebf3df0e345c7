"""What data-dependent operators allocate, from sizes alone: the plain versions of `longcat::` with assumed numbers of rows.

Each allocates what its plain version does on a CPU, in the same order, and computes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longcat.ops.matmul import upcast


def sum_rows(rows: Tensor, row_index: Tensor, weights: Tensor | None) -> Tensor:
    """`longcat.ops.rows._sum_rows`: every row belongs to one FFN selection."""
    num_rows, num_tokens = rows.shape[0], row_index.shape[0]
    flat = row_index.reshape(-1)
    chosen = flat >= 0
    row = flat.new_empty(num_rows)
    ends = chosen.view(row_index.shape).sum(1).cumsum(0)
    weight = None if weights is None else rows.new_empty(num_rows)
    out = rows.new_empty(num_tokens, rows.shape[1])
    if rows.element_size() == 2:
        values = rows.new_empty(num_rows) if weight is None else weight
        starts = ends.new_empty(num_tokens + 1)
        del values, starts, row
        return out
    values = rows if weight is None else rows * rows.new_zeros(num_rows)[:, None]
    del values
    return out


def embedding_gradient(grad: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """`longcat.ops.embedding.embedding_gradient` for ids drawn evenly: the expected number of different ones."""
    out = grad.new_zeros(num_rows, grad.shape[1])
    ids, order = torch.sort(ids, stable=True)
    different = round(num_rows * (1 - (1 - 1 / num_rows) ** ids.shape[0]))
    upcast_grad = grad.to(torch.float32)
    sums = upcast_grad.new_empty(different, grad.shape[1])
    rounded = sums.to(grad.dtype)
    del order, rounded
    return out


def grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """`longcat.ops.grouped.grouped_product` where experts have different numbers of rows."""
    a_upcast, _ = upcast(a, b)
    return a_upcast.new_empty(a.shape[0], b.shape[2]).to(a.dtype)


def grouped_sum(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """`longcat.ops.grouped.grouped_sum` likewise, without its buffer of one expert's rows."""
    a_upcast, _ = upcast(a, b)
    return a_upcast.new_empty(ends.shape[0], a.shape[1], b.shape[1]).to(a.dtype)
