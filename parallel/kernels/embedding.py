"""Kernels of the embedding's gradient: sums of blocks of equal ids, then of the blocks, each in order.

Ids are sorted once. A program stands at each sorted place and works where a block (or a run of several blocks)
begins, so that the number of runs never reaches the host.
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
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < width
    start, stop, row = tl.load(first + place), tl.load(last + place), tl.load(ids + place)
    if ((place - start) % BLOCK == 0) & (row < num_rows):
        total = tl.zeros((COLUMNS,), tl.float32)
        for one in range(place, tl.minimum(stop, place + BLOCK)):
            origin = tl.load(order + one)
            total += tl.load(grad + origin * width + column, mask=here, other=0.0).to(tl.float32)
        if stop - start <= BLOCK:
            tl.store(out + row * width + column, rounded(total, out.dtype.element_ty), mask=here)
        else:  # no two blocks of long runs begin within BLOCK places, but the end of one run and the start of the next
            slot = place // BLOCK * 2 + (place == start).to(tl.int64)
            tl.store(partial + slot * width + column, total, mask=here)


@triton.jit
def run_kernel(ids, first, last, partial, out, num_rows, width, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = column < width
    start, stop, row = tl.load(first + place), tl.load(last + place), tl.load(ids + place)
    if (place == start) & (stop - start > BLOCK) & (row < num_rows):
        total = tl.zeros((COLUMNS,), tl.float32)
        for one in range(place, stop, BLOCK):
            slot = one // BLOCK * 2 + (one == start).to(tl.int64)
            total += tl.load(partial + slot * width + column, mask=here, other=0.0)
        tl.store(out + row * width + column, rounded(total, out.dtype.element_ty), mask=here)


def embedding_gradient(grad: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """grad [T, D], ids [T] → [V, D], each row the sum of ``grad`` over the places of its id; ids from V on drop."""
    width = grad.shape[1]
    out = grad.new_zeros(num_rows, width)
    if ids.shape[0] == 0:
        return out
    ids, order = torch.sort(ids, stable=True)
    first, last = torch.searchsorted(ids, ids), torch.searchsorted(ids, ids, right=True)  # of the run at each place
    columns = min(COLUMNS, power_of_two(width))
    partial = torch.empty(2 * triton.cdiv(ids.shape[0], BLOCK), width, dtype=torch.float32, device=grad.device)
    grid = ids.shape[0], triton.cdiv(width, columns)
    sizes = {"BLOCK": BLOCK, "COLUMNS": columns, **UNFUSED}
    block_kernel[grid](grad, ids, order, first, last, partial, out, num_rows, width, **sizes)
    run_kernel[grid](ids, first, last, partial, out, num_rows, width, **sizes)
    return out
