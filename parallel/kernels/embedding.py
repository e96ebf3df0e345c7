"""Kernels of the embedding's gradient: sums of blocks of equal ids, then of the blocks, each in order.

Ids are sorted once. There is one program per sorted position, and only those at the start of a block (or of a run of
several blocks) do work, so that the host never needs the number of runs.
"""

# T ids, V rows of the table, D width

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longcat.ops.embedding import BLOCK
from parallel.kernels.common import UNFUSED, power_of_two, rounded

COLUMNS = 1024  # of a program


@triton.jit
def block_kernel(
    grad, ids, order, first, last, partial, out, num_rows, width, BLOCK: tl.constexpr, COLUMNS: tl.constexpr
):
    position = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_bounds = column < width
    start, stop, row = tl.load(first + position), tl.load(last + position), tl.load(ids + position)
    if ((position - start) % BLOCK == 0) & (row < num_rows):
        total = tl.zeros((COLUMNS,), tl.float32)
        for current in range(position, tl.minimum(stop, position + BLOCK)):
            origin = tl.load(order + current)
            total += tl.load(grad + origin * width + column, mask=in_bounds, other=0.0).to(tl.float32)
        if stop - start <= BLOCK:
            tl.store(out + row * width + column, rounded(total, out.dtype.element_ty), mask=in_bounds)
        else:  # within BLOCK positions, two blocks begin only where one run ends and the next starts: hence two slots
            slot = position // BLOCK * 2 + (position == start).to(tl.int64)
            tl.store(partial + slot * width + column, total, mask=in_bounds)


@triton.jit
def run_kernel(ids, first, last, partial, out, num_rows, width, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    position = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    in_bounds = column < width
    start, stop, row = tl.load(first + position), tl.load(last + position), tl.load(ids + position)
    if (position == start) & (stop - start > BLOCK) & (row < num_rows):
        total = tl.zeros((COLUMNS,), tl.float32)
        for current in range(position, stop, BLOCK):
            slot = current // BLOCK * 2 + (current == start).to(tl.int64)
            total += tl.load(partial + slot * width + column, mask=in_bounds, other=0.0)
        tl.store(out + row * width + column, rounded(total, out.dtype.element_ty), mask=in_bounds)


def embedding_gradient(grad: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """grad [T, D], ids [T] → [V, D], row i the sum of ``grad`` over id i's positions; ids of V or more drop."""
    width = grad.shape[1]
    out = grad.new_zeros(num_rows, width)
    if ids.shape[0] == 0:
        return out
    ids, order = torch.sort(ids, stable=True)
    first, last = torch.searchsorted(ids, ids), torch.searchsorted(ids, ids, right=True)  # of each position's run
    columns = min(COLUMNS, power_of_two(width))
    partial = torch.empty(2 * triton.cdiv(ids.shape[0], BLOCK), width, dtype=torch.float32, device=grad.device)
    grid = ids.shape[0], triton.cdiv(width, columns)
    sizes = {"BLOCK": BLOCK, "COLUMNS": columns, **UNFUSED}
    block_kernel[grid](grad, ids, order, first, last, partial, out, num_rows, width, **sizes)
    run_kernel[grid](ids, first, last, partial, out, num_rows, width, **sizes)
    return out
