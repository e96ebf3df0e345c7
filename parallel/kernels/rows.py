"""Kernels that gather rows, sum them for each token, weigh them, and their backward: one program for each row or token.

Each number of a result is written by one program, which adds in the order of `longcat/ops/rows.py`. The backward of the
weighted sum reads a token's gradient once for all its rows.
"""

# T tokens, K chosen, P rows (FFN selections), D width

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longcat.ops.library import num_partial_sums
from parallel.kernels.common import UNFUSED, power_of_two, rounded, sum_halves

BLOCK = 1024  # columns of a program


def _grid(num_rows: int, width: int) -> tuple[tuple[int, int], int]:
    """Programs for ``num_rows`` × ``width`` numbers, and the columns of each."""
    block = min(BLOCK, power_of_two(width))
    return (num_rows, triton.cdiv(width, block)), block


@triton.jit
def gather_kernel(source, index, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    origin = tl.load(index + row)
    tl.store(out + row * width + column, tl.load(source + origin * width + column, mask=here), mask=here)


def gather_rows(source: Tensor, index: Tensor) -> Tensor:
    """source [S, D], index [P] → rows [P, D]."""
    out = source.new_empty(index.shape[0], source.shape[1])
    if out.numel():
        grid, block = _grid(*out.shape)
        gather_kernel[grid](source.contiguous(), index, out, out.shape[1], BLOCK=block, **UNFUSED)
    return out


@triton.jit
def sum_kernel(
    rows, gates, place, x, out, width,
    K: tl.constexpr, KP: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr, IDENTITY: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = out.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    here = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(K):
        row = tl.load(place + token * K + choice)
        is_ffn = row >= 0
        value = tl.load(rows + row * width + column, mask=here & is_ffn, other=0.0).to(tl.float32)
        if WEIGHTED:
            gate = tl.load(gates + token * K + choice, mask=is_ffn, other=0.0)
            value = value * rounded(gate, DTYPE).to(tl.float32)
        total += value
    total = rounded(total, DTYPE)
    if IDENTITY:
        choice = tl.arange(0, KP)
        row = tl.load(place + token * K + choice, mask=choice < K, other=0)
        gate = tl.load(gates + token * K + choice, mask=(choice < K) & (row < 0), other=0.0)
        identity = tl.sum(sum_halves(tl.reshape(gate, (1, KP)), 1, STEPS), axis=0)
        own = tl.load(x + token * width + column, mask=here, other=0.0).to(tl.float32)
        total = rounded(own * identity + total.to(tl.float32), DTYPE)
    tl.store(out + token * width + column, total, mask=here)


def _sum(rows: Tensor, gates: Tensor | None, place: Tensor, x: Tensor | None) -> Tensor:
    top_k = place.shape[1]
    out = rows.new_empty(place.shape[0], rows.shape[1])
    if out.numel():
        grid, block = _grid(*out.shape)
        padded = power_of_two(top_k)
        sum_kernel[grid](
            rows, rows if gates is None else gates, place, rows if x is None else x, out, out.shape[1],
            K=top_k, KP=padded, STEPS=padded.bit_length() - 1, BLOCK=block,
            WEIGHTED=gates is not None, IDENTITY=x is not None, **UNFUSED,
        )  # fmt: skip
    return out


def sum_rows(rows: Tensor, place: Tensor) -> Tensor:
    """rows [P, D], place [T, K] (a row, or -1) → for each token the sum of its rows [T, D]."""
    return _sum(rows, None, place, None)


def combine_rows(rows: Tensor, gates: Tensor, place: Tensor, x: Tensor | None) -> Tensor:
    """rows [P, D], gates and place [T, K], x [T, D] → Σ gate · row, rounded, + Σ of the other gates · x, rounded."""
    return _sum(rows, gates, place, x)


@triton.jit
def combine_backward_kernel(
    grad, rows, gates, place, x, grad_rows, grad_gates, grad_x, width,
    K: tl.constexpr, KP: tl.constexpr, GATE_STEPS: tl.constexpr, PARTIALS: tl.constexpr, STEPS: tl.constexpr,
    IDENTITY: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = grad_rows.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, KP)
    row = tl.load(place + token * K + choice, mask=choice < K, other=-1)
    gate = tl.load(gates + token * K + choice, mask=choice < K, other=0.0)
    is_ffn = row >= 0
    weight = rounded(gate, DTYPE).to(tl.float32)
    partials = tl.zeros((KP, PARTIALS), tl.float32)
    own_partials = tl.zeros((1, PARTIALS), tl.float32)
    identity = tl.sum(sum_halves(tl.reshape(tl.where(is_ffn, 0.0, gate), (1, KP)), 1, GATE_STEPS), axis=0)
    for start in range(0, width, PARTIALS):
        column = start + tl.arange(0, PARTIALS)
        here = column < width
        slope = tl.load(grad + token * width + column, mask=here, other=0.0).to(tl.float32)
        where = row[:, None] * width + column[None, :]
        mask = is_ffn[:, None] & here[None, :]
        value = tl.load(rows + where, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_rows + where, rounded(slope[None, :] * weight[:, None], DTYPE), mask=mask)
        partials += value * slope[None, :]
        if IDENTITY:
            own = tl.load(x + token * width + column, mask=here, other=0.0).to(tl.float32)
            own_partials += (own * slope)[None, :]
            tl.store(grad_x + token * width + column, rounded(slope * identity, DTYPE), mask=here)
    of_gate = sum_halves(partials, KP, STEPS)
    of_identity = tl.sum(sum_halves(own_partials, 1, STEPS), axis=0)
    tl.store(grad_gates + token * K + choice, tl.where(is_ffn, of_gate, of_identity), mask=choice < K)


def combine_rows_backward(
    grad: Tensor, rows: Tensor, gates: Tensor, token: Tensor, selection: Tensor, place: Tensor, x: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [T, D] → the gradients by rows [P, D], gates [T, K] and x [T, D] (no elements without ``x``).

    ``token`` and ``selection`` are the plain version's: a program here has a token, and finds its rows by ``place``.
    """
    num_tokens, top_k = place.shape
    width = grad.shape[1]
    grad_rows, grad_gates = torch.empty_like(rows), torch.empty_like(gates)
    grad_x = grad.new_empty(0) if x is None else torch.empty_like(x)
    if num_tokens:
        padded, partials = power_of_two(top_k), num_partial_sums(width)
        combine_backward_kernel[(num_tokens,)](
            grad, rows, gates, place, grad if x is None else x, grad_rows, grad_gates, grad_x, width,
            K=top_k, KP=padded, GATE_STEPS=padded.bit_length() - 1, PARTIALS=partials, STEPS=partials.bit_length() - 1,
            IDENTITY=x is not None, **UNFUSED,
        )  # fmt: skip
    return grad_rows, grad_gates, grad_x
