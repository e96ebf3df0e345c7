"""Grouped products: every expert's rows times that expert's matrix, and the sums over its rows, in one launch each.

For GPUs and dtypes that torch's grouped kernel does not take. The host never reads the experts' rows: it launches as
many tiles as there can be, and each finds its expert in a table that is made on the device. Each number of a result is
one program's sum in float32, in the order of the inner dimension.
"""

# P rows sorted by expert, I input width, O output width, E experts, B tiles of rows

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.kernels.common import factor, power_of_two, rounded

ROWS, COLUMNS, INNER = 64, 128, 32  # of a tile, and of what it multiplies at once


@triton.jit
def rows_kernel(
    a, b, out, expert_of, tile_ends, ends, inner, columns, num_experts, a_row, a_inner, b_expert, b_inner, b_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    expert = tl.load(expert_of + tile).to(tl.int64)
    if expert < num_experts:
        before = expert > 0
        first_tile = tl.load(tile_ends + expert - 1, mask=before, other=0)
        first_row = tl.load(ends + expert - 1, mask=before, other=0)
        row = (first_row + (tile - first_tile) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        is_own = row < tl.load(ends + expert)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        in_bounds = column < columns
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
        for start in range(0, inner, INNER):
            index = start + tl.arange(0, INNER)
            left = a + row[:, None] * a_row + index[None, :] * a_inner
            right = b + expert * b_expert + index[:, None] * b_inner + column[None, :] * b_column
            left_values = tl.load(left, mask=is_own[:, None] & (index < inner)[None, :], other=0.0)
            right_values = tl.load(right, mask=(index < inner)[:, None] & in_bounds[None, :], other=0.0)
            total = tl.dot(factor(left_values), factor(right_values), total, input_precision="ieee")
        target = out + row[:, None] * columns + column[None, :]
        tl.store(target, rounded(total, out.dtype.element_ty), mask=is_own[:, None] & in_bounds[None, :])


@triton.jit
def sums_kernel(
    a, b, out, ends, outputs, inputs, a_row, a_column, b_row, b_column,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0).to(tl.int64)
    first = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    output = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    input = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, end, INNER):
        row = (start + tl.arange(0, INNER)).to(tl.int64)
        left = a + row[None, :] * a_row + output[:, None] * a_column
        right = b + row[:, None] * b_row + input[None, :] * b_column
        left_values = tl.load(left, mask=(row < end)[None, :] & (output < outputs)[:, None], other=0.0)
        right_values = tl.load(right, mask=(row < end)[:, None] & (input < inputs)[None, :], other=0.0)
        total = tl.dot(factor(left_values), factor(right_values), total, input_precision="ieee")
    target = out + (expert * outputs + output[:, None]) * inputs + input[None, :]
    in_bounds = (output < outputs)[:, None] & (input < inputs)[None, :]
    tl.store(target, rounded(total, out.dtype.element_ty), mask=in_bounds)


def tiles(ends: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The expert of each tile [B], E for a tile that is not needed, and the tile after each expert's last [E]."""
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    tile_ends = ((counts + ROWS - 1) // ROWS).cumsum(0)
    most = triton.cdiv(num_rows, ROWS) + ends.shape[0]
    return torch.searchsorted(tile_ends, torch.arange(most, device=ends.device), right=True), tile_ends


def grouped_rows(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Rows a [P, I] times their expert's b [E, I, O] → [P, O]; ``ends`` [E]: the row after each expert's last."""
    (num_rows, inner), (num_experts, _, columns) = a.shape, b.shape
    out = a.new_empty(num_rows, columns)
    if out.numel():
        expert_of, tile_ends = tiles(ends, num_rows)
        block = min(COLUMNS, max(16, power_of_two(columns)))
        rows_kernel[expert_of.shape[0], triton.cdiv(columns, block)](
            a, b, out, expert_of, tile_ends, ends, inner, columns, num_experts, *a.stride(), *b.stride(),
            ROWS=ROWS, COLUMNS=block, INNER=INNER,
        )  # fmt: skip
    return out


def grouped_sums(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Σ over each expert's rows of a [P, O] ⊗ b [P, I] → [E, O, I]; zeros for an expert without rows."""
    num_experts, outputs, inputs = ends.shape[0], a.shape[1], b.shape[1]
    out = a.new_empty(num_experts, outputs, inputs)
    if out.numel():
        block = min(COLUMNS, max(16, power_of_two(inputs)))
        sums_kernel[num_experts, triton.cdiv(outputs, ROWS), triton.cdiv(inputs, block)](
            a, b, out, ends, outputs, inputs, *a.stride(), *b.stride(), ROWS=ROWS, COLUMNS=block, INNER=INNER
        )
    return out
