"""Kernels that count selections and sort them by expert, stably: histograms of blocks, prefix sums, row indices.

A selection's row is the expert's first row, plus the block's offset within the expert, plus the number of earlier
selections in the block of the same expert. All are integers found by comparisons; no program shares a counter.
"""

# T tokens, K chosen, N FFN experts, Z identity experts, P FFN selections (rows), G blocks of selections

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.kernels.common import power_of_two

BLOCK = 128  # selections of a program
EXPERTS = 64  # experts that a program counts at once
SPREAD = 1024  # experts whose gradients a program writes
SCAN = 1024  # blocks that a program scans at once


@triton.jit
def histogram_kernel(indices, histogram, size, num_routed, num_blocks, BLOCK: tl.constexpr, EXPERTS: tl.constexpr):
    block = tl.program_id(0)
    selection = block * BLOCK + tl.arange(0, BLOCK)
    chosen = tl.load(indices + selection, mask=selection < size, other=-1).to(tl.int32)
    for start in range(0, num_routed, EXPERTS):
        expert = start + tl.arange(0, EXPERTS)
        count = tl.sum((chosen[:, None] == expert[None, :]).to(tl.int32), axis=0)
        tl.store(histogram + expert * num_blocks + block, count, mask=expert < num_routed)


@triton.jit
def scan_kernel(histogram, counts, num_blocks, SCAN: tl.constexpr):
    expert = tl.program_id(0)
    before = tl.zeros((1,), tl.int32)
    for start in range(0, num_blocks, SCAN):
        block = start + tl.arange(0, SCAN)
        count = tl.load(histogram + expert * num_blocks + block, mask=block < num_blocks, other=0)
        offset = tl.cumsum(count, 0) - count + before
        tl.store(histogram + expert * num_blocks + block, offset, mask=block < num_blocks)
        before += tl.sum(count, axis=0)
    tl.store(counts + expert + tl.arange(0, 1), before.to(tl.int64))


@triton.jit
def row_index_kernel(
    indices, histogram, ends, counts, token, selection, row_index, size, num_blocks, num_experts, top_k,
    BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    number = tl.arange(0, BLOCK)
    flat = block * BLOCK + number
    in_bounds = flat < size
    chosen = tl.load(indices + flat, mask=in_bounds, other=-1).to(tl.int32)
    earlier = (chosen[:, None] == chosen[None, :]) & (number[None, :] < number[:, None])
    rank = tl.sum(earlier.to(tl.int32), axis=1)
    offset = tl.load(histogram + chosen * num_blocks + block, mask=in_bounds, other=0)
    first = tl.load(ends + chosen, mask=in_bounds, other=0) - tl.load(counts + chosen, mask=in_bounds, other=0)
    row = first + offset + rank
    is_ffn = in_bounds & (chosen < num_experts)
    tl.store(row_index + flat, tl.where(is_ffn, row, -1), mask=in_bounds)
    tl.store(selection + row, flat.to(tl.int64), mask=is_ffn)
    tl.store(token + row, (flat // top_k).to(tl.int64), mask=is_ffn)


@triton.jit
def spread_kernel(grad, indices, out, num_routed, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), out.dtype.element_ty)
    for choice in tl.static_range(K):
        chosen = tl.load(indices + token * K + choice)
        total += tl.where(expert == chosen, tl.load(grad + token * K + choice), 0.0)
    tl.store(out + token * num_routed + expert, total, mask=expert < num_routed)


def spread_gates(grad: Tensor, indices: Tensor, num_routed: int) -> Tensor:
    """grad, indices [T, K] → [T, N + Z], zero where a token has not selected an expert."""
    num_tokens, top_k = indices.shape
    out = grad.new_empty(num_tokens, num_routed)
    if num_tokens:
        block = min(SPREAD, power_of_two(num_routed))
        grid = num_tokens, triton.cdiv(num_routed, block)
        spread_kernel[grid](grad, indices.contiguous(), out, num_routed, K=top_k, BLOCK=block)
    return out


def _histogram(indices: Tensor, num_routed: int) -> tuple[Tensor, Tensor]:
    """indices [T, K] → selections of each expert before each block [N + Z, G] int32, and in all [N + Z] int64."""
    num_blocks = triton.cdiv(indices.numel(), BLOCK)
    histogram = torch.empty(num_routed, num_blocks, dtype=torch.int32, device=indices.device)
    counts = torch.empty(num_routed, dtype=torch.int64, device=indices.device)
    experts = min(EXPERTS, power_of_two(num_routed))
    histogram_kernel[(num_blocks,)](
        indices, histogram, indices.numel(), num_routed, num_blocks, BLOCK=BLOCK, EXPERTS=experts
    )
    scan_kernel[(num_routed,)](histogram, counts, num_blocks, SCAN=min(SCAN, power_of_two(num_blocks)))
    return histogram, counts


def count_selections(indices: Tensor, num_routed: int) -> Tensor:
    """indices [T, K] → selections of each expert [N + Z] int64."""
    if not indices.numel():
        return torch.zeros(num_routed, dtype=torch.int64, device=indices.device)
    return _histogram(indices.contiguous(), num_routed)[1]


def plan(
    indices: Tensor, num_experts: int, num_routed: int, num_rows: int | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """indices [T, K] → token [P], selection [P], row_index [T, K], counts [N + Z] of `longcat.ops.permute.Permutation`.

    Without ``num_rows`` the host waits for the number once, after it has launched all kernels.
    """
    indices, size = indices.contiguous(), indices.numel()
    num_blocks = triton.cdiv(size, BLOCK)
    counts = torch.zeros(num_routed, dtype=torch.int64, device=indices.device)
    capacity = size if num_rows is None else num_rows
    token, selection, row_index = indices.new_empty(capacity), indices.new_empty(capacity), torch.empty_like(indices)
    if size:
        histogram, counts = _histogram(indices, num_routed)
        row_index_kernel[(num_blocks,)](
            indices, histogram, counts.cumsum(0), counts, token, selection, row_index,
            size, num_blocks, num_experts, indices.shape[1], BLOCK=BLOCK,
        )  # fmt: skip
    if num_rows is None:
        num_rows = int(counts[:num_experts].sum())
        token, selection = token[:num_rows].clone(), selection[:num_rows].clone()  # frees the space of the others
    return token, selection, row_index, counts
