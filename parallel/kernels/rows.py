"""Kernels that gather rows and sum them per token, weighted or not, and the backward: one program per row or token.

Each element of a result is written by one program, which adds in the order of `longcat/ops/rows.py`. The backward of
the weighted sum reads a token's gradient once for all its rows.
"""

# T tokens, K chosen, P rows (FFN selections), D width

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longcat.ops.torch_library import num_partial_sums
from parallel.kernels.common import UNFUSED, power_of_two, rounded, tree_sum

BLOCK = 1024  # columns of a program


def _grid(num_rows: int, width: int) -> tuple[tuple[int, int], int]:
    """The grid of programs for a tensor [``num_rows``, ``width``], and the columns of each program."""
    block = min(BLOCK, power_of_two(width))
    return (num_rows, triton.cdiv(width, block)), block


@triton.jit
def gather_kernel(source, index, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = column < width
    origin = tl.load(index + row)
    tl.store(out + row * width + column, tl.load(source + origin * width + column, mask=in_bounds), mask=in_bounds)


def gather_rows(source: Tensor, index: Tensor) -> Tensor:
    """source [S, D], index [P] → rows [P, D]."""
    out = source.new_empty(index.shape[0], source.shape[1])
    if out.numel():
        grid, block = _grid(*out.shape)
        gather_kernel[grid](source.contiguous(), index, out, out.shape[1], BLOCK=block, **UNFUSED)
    return out


@triton.jit
def sum_kernel(
    rows, gates, row_index, x, out, width,
    K: tl.constexpr, KP: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
    WEIGHTED: tl.constexpr, IDENTITY: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = out.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for choice in tl.static_range(K):
        row = tl.load(row_index + token * K + choice)
        is_ffn = row >= 0
        value = tl.load(rows + row * width + column, mask=in_bounds & is_ffn, other=0.0).to(tl.float32)
        if WEIGHTED:
            gate = tl.load(gates + token * K + choice, mask=is_ffn, other=0.0)
            value = value * rounded(gate, DTYPE).to(tl.float32)
        total += value
    total = rounded(total, DTYPE)
    if IDENTITY:
        choice = tl.arange(0, KP)
        row = tl.load(row_index + token * K + choice, mask=choice < K, other=0)
        gate = tl.load(gates + token * K + choice, mask=(choice < K) & (row < 0), other=0.0)
        identity = tl.sum(tree_sum(tl.reshape(gate, (1, KP)), 1, STEPS), axis=0)
        token_x = tl.load(x + token * width + column, mask=in_bounds, other=0.0).to(tl.float32)
        total = rounded(token_x * identity + total.to(tl.float32), DTYPE)
    tl.store(out + token * width + column, total, mask=in_bounds)


def _sum(rows: Tensor, gates: Tensor | None, row_index: Tensor, x: Tensor | None) -> Tensor:
    top_k = row_index.shape[1]
    out = rows.new_empty(row_index.shape[0], rows.shape[1])
    if out.numel():
        grid, block = _grid(*out.shape)
        padded = power_of_two(top_k)
        sum_kernel[grid](
            rows, rows if gates is None else gates, row_index, rows if x is None else x, out, out.shape[1],
            K=top_k, KP=padded, STEPS=padded.bit_length() - 1, BLOCK=block,
            WEIGHTED=gates is not None, IDENTITY=x is not None, **UNFUSED,
        )  # fmt: skip
    return out


def sum_rows(rows: Tensor, row_index: Tensor) -> Tensor:
    """rows [P, D], row_index [T, K] (a row, or -1) → for each token the sum of its rows [T, D]."""
    return _sum(rows, None, row_index, None)


def combine_rows(rows: Tensor, gates: Tensor, row_index: Tensor, x: Tensor | None) -> Tensor:
    """rows [P, D], gates, row_index [T, K], x [T, D] → Σ gate · row, rounded, + Σ of the other gates · x, rounded."""
    return _sum(rows, gates, row_index, x)


@triton.jit
def combine_backward_kernel(
    grad, gates, row_index, x, grad_rows, grad_gates, grad_x, width,
    K: tl.constexpr, KP: tl.constexpr, GATE_STEPS: tl.constexpr, PARTIALS: tl.constexpr, STEPS: tl.constexpr,
    IDENTITY: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = grad_rows.dtype.element_ty
    token = tl.program_id(0).to(tl.int64)
    choice = tl.arange(0, KP)
    row = tl.load(row_index + token * K + choice, mask=choice < K, other=-1)
    gate = tl.load(gates + token * K + choice, mask=choice < K, other=0.0)
    is_ffn = row >= 0
    weight = rounded(gate, DTYPE).to(tl.float32)
    identity_partials = tl.zeros((1, PARTIALS), tl.float32)
    identity = tl.sum(tree_sum(tl.reshape(tl.where(is_ffn, 0.0, gate), (1, KP)), 1, GATE_STEPS), axis=0)
    for start in range(0, width, PARTIALS):
        column = start + tl.arange(0, PARTIALS)
        in_bounds = column < width
        token_grad = tl.load(grad + token * width + column, mask=in_bounds, other=0.0).to(tl.float32)
        offsets = row[:, None] * width + column[None, :]
        mask = is_ffn[:, None] & in_bounds[None, :]
        tl.store(grad_rows + offsets, rounded(token_grad[None, :] * weight[:, None], DTYPE), mask=mask)
        if IDENTITY:
            token_x = tl.load(x + token * width + column, mask=in_bounds, other=0.0).to(tl.float32)
            identity_partials += (token_x * token_grad)[None, :]
            tl.store(grad_x + token * width + column, rounded(token_grad * identity, DTYPE), mask=in_bounds)
    gate_grad = tl.sum(tree_sum(identity_partials, 1, STEPS), axis=0)
    tl.store(grad_gates + token * K + choice, tl.where(is_ffn, 0.0, gate_grad), mask=choice < K)


def combine_rows_backward(
    grad: Tensor, gates: Tensor, token: Tensor, selection: Tensor, row_index: Tensor, x: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [T, D] → the gradients of rows [P, D], identity gates [T, K] and x [T, D] (no elements without ``x``).

    Only the plain version needs ``token`` and ``selection``: a program finds its token's rows in ``row_index``.
    """
    num_tokens, top_k = row_index.shape
    width = grad.shape[1]
    grad_rows, grad_gates = grad.new_empty(token.shape[0], width), torch.empty_like(gates)
    grad_x = grad.new_empty(0) if x is None else torch.empty_like(x)
    if num_tokens:
        padded, partials = power_of_two(top_k), num_partial_sums(width)
        combine_backward_kernel[(num_tokens,)](
            grad, gates, row_index, grad if x is None else x, grad_rows, grad_gates, grad_x, width,
            K=top_k, KP=padded, GATE_STEPS=padded.bit_length() - 1, PARTIALS=partials, STEPS=partials.bit_length() - 1,
            IDENTITY=x is not None, **UNFUSED,
        )  # fmt: skip
    return grad_rows, grad_gates, grad_x


@triton.jit
def dot_kernel(a, b, out, width, PARTIALS: tl.constexpr, STEPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    partials = tl.zeros((1, PARTIALS), tl.float32)
    for start in range(0, width, PARTIALS):
        column = start + tl.arange(0, PARTIALS)
        in_bounds = column < width
        first = tl.load(a + row * width + column, mask=in_bounds, other=0.0).to(tl.float32)
        second = tl.load(b + row * width + column, mask=in_bounds, other=0.0).to(tl.float32)
        partials += (first * second)[None, :]
    tl.store(out + row, tl.sum(tree_sum(partials, 1, STEPS), axis=0))


def dot_rows(a: Tensor, b: Tensor) -> Tensor:
    """a, b [R, D] → the dot product of each pair of rows [R], float32."""
    num_rows, width = a.shape
    out = a.new_empty(num_rows, dtype=torch.float32)
    if num_rows:
        partials = num_partial_sums(width)
        dot_kernel[(num_rows,)](
            a.contiguous(), b.contiguous(), out, width,
            PARTIALS=partials, STEPS=partials.bit_length() - 1, **UNFUSED,
        )  # fmt: skip
    return out
