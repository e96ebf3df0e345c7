"""Kernels of `longcat/ops/one_pass.py`: RMSNorm, SwiGLU and rotation, each number read and written once.

A norm's program holds a whole row. Its backward's program holds ROWS rows one after another and the sum of their
contributions to the gain's gradient, which a second kernel adds up. Programs of the rotation hold all heads of a token.
"""

# R rows (tokens), D width, F hidden width, B sequences, S positions, H heads, N width without positions, P rotary width

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from longcat.ops.one_pass import BLOCKS, EXP_RANGE, EXP_TERMS, LN2_HIGH, LN2_LOW, LOG2_E, ROWS
from parallel.kernels.common import UNFUSED, power_of_two, rounded, tree_sum

COLUMNS = 16  # of a program that adds up the gain's gradient
BLOCK = 1024  # numbers of a program of the SwiGLU
_LOWEST, _HIGHEST = tl.constexpr(EXP_RANGE[0]), tl.constexpr(EXP_RANGE[1])
_LOG2_E, _LN2_HIGH, _LN2_LOW = tl.constexpr(LOG2_E), tl.constexpr(LN2_HIGH), tl.constexpr(LN2_LOW)
_C7, _C6, _C5, _C4, _C3, _C2, _C1, _C0 = (tl.constexpr(term) for term in EXP_TERMS)


def _warps(width: int) -> int:
    """Warps of a program that holds a row of ``width`` numbers: 32 numbers a thread."""
    return min(16, max(1, width // 1024))


def _rows(x: Tensor) -> Tensor:
    """x [R, D] with adjacent columns; its rows may be apart."""
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit
def _row_sum(values, STEPS: tl.constexpr, SIZE: tl.constexpr):
    return tl.sum(tree_sum(tl.reshape(values, (1, SIZE)), 1, STEPS), axis=0) + 0.0


@triton.jit
def norm_kernel(
    x, y, total, gain, out, inverses, width, stride, y_stride, reciprocal, eps,
    SIZE: tl.constexpr, STEPS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    in_bounds = column < width
    value = tl.load(x + row * stride + column, mask=in_bounds, other=0.0).to(tl.float32)
    if ADD:
        added = value + tl.load(y + row * y_stride + column, mask=in_bounds, other=0.0).to(tl.float32)
        tl.store(total + row * width + column, rounded(added, DTYPE), mask=in_bounds)
        value = rounded(added, DTYPE).to(tl.float32)
    mean = _row_sum(value * value, STEPS, SIZE) * reciprocal
    inverse = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    weight = rounded(tl.load(gain + column, mask=in_bounds, other=0.0).to(tl.float32), DTYPE).to(tl.float32)
    normed = rounded(value * inverse, DTYPE).to(tl.float32)
    tl.store(out + row * width + column, rounded(normed * weight, DTYPE), mask=in_bounds)
    tl.store(inverses + row, inverse)


def norm_rows(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [R, D], gain [D] → the normed rows [R, D] in x's dtype, 1 / sqrt(mean(x²) + eps) [R, 1] in float32."""
    _, out, inverse = _norm(x, None, gain, eps)
    return out, inverse


def add_norm_rows(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x, y [R, D] → x + y in their dtype, and `norm_rows` of that."""
    return _norm(x, y, gain, eps)


def _norm(x: Tensor, y: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, (num_rows, width) = _rows(x), x.shape
    other = x if y is None else _rows(y)
    out, inverse = x.new_empty(num_rows, width), x.new_empty(num_rows, 1, dtype=torch.float32)
    total = x if y is None else torch.empty_like(out)
    if num_rows:
        size = power_of_two(width)
        norm_kernel[(num_rows,)](
            x, other, total, gain.contiguous(), out, inverse, width, x.stride(0), other.stride(0), 1.0 / width, eps,
            SIZE=size, STEPS=size.bit_length() - 1, ADD=y is not None, num_warps=_warps(size), **UNFUSED,
        )  # fmt: skip
    return total, out, inverse


@triton.jit
def norm_backward_kernel(
    grad_total, grad, x, gain, inverses, grad_x, partial, num_rows, width,
    total_stride, grad_stride, stride, reciprocal,
    SIZE: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = grad_x.dtype.element_ty
    block = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, SIZE)
    in_bounds = column < width
    weight = rounded(tl.load(gain + column, mask=in_bounds, other=0.0).to(tl.float32), DTYPE).to(tl.float32)
    total = tl.zeros((SIZE,), tl.float32)
    for row in range(block * ROWS, tl.minimum(block * ROWS + ROWS, num_rows)):
        inverse = tl.load(inverses + row)
        upstream = tl.load(grad + row * grad_stride + column, mask=in_bounds, other=0.0).to(tl.float32)
        normed = tl.load(x + row * stride + column, mask=in_bounds, other=0.0).to(tl.float32) * inverse
        total += upstream * normed
        grad_normed = upstream * weight
        mean = _row_sum(grad_normed * normed, STEPS, SIZE) * reciprocal
        result = (grad_normed - normed * mean) * inverse
        if ADD:
            others = tl.load(grad_total + row * total_stride + column, mask=in_bounds, other=0.0).to(tl.float32)
            result = others + rounded(result, DTYPE).to(tl.float32)
        tl.store(grad_x + row * width + column, rounded(result, DTYPE), mask=in_bounds)
    tl.store(partial + block * width + column, total, mask=in_bounds)


@triton.jit
def gain_kernel(
    partial, out, num_blocks, width, BLOCKS: tl.constexpr, STEPS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for start in range(0, num_blocks, BLOCKS):
        block = (start + tl.arange(0, BLOCKS)).to(tl.int64)
        mask = (column < width)[:, None] & (block < num_blocks)[None, :]
        sums = tl.load(partial + block[None, :] * width + column[:, None], mask=mask, other=0.0)
        total += tree_sum(sums, COLUMNS, STEPS)
    tl.store(out + column, rounded(total, out.dtype.element_ty), mask=column < width)


def norm_rows_backward(grad: Tensor, x: Tensor, gain: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """→ the gradients of x [R, D] and of the gain [D]."""
    return _norm_backward(None, grad, x, gain, inverse)


def add_norm_rows_backward(
    grad_total: Tensor, grad: Tensor, total: Tensor, gain: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """→ the gradients of x, which is that of y too, and of the gain; ``grad_total`` is that of x + y's other uses."""
    return _norm_backward(grad_total, grad, total, gain, inverse)


def _norm_backward(
    grad_total: Tensor | None, grad: Tensor, x: Tensor, gain: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    others = _rows(grad if grad_total is None else grad_total)
    grad, x, (num_rows, width) = _rows(grad), _rows(x), x.shape
    grad_x, grad_gain = x.new_empty(num_rows, width), torch.empty_like(gain)
    num_blocks, size = triton.cdiv(num_rows, ROWS), power_of_two(width)
    partial = x.new_empty(num_blocks, width, dtype=torch.float32)
    if num_rows:
        norm_backward_kernel[(num_blocks,)](
            others, grad, x, gain.contiguous(), inverse.contiguous(), grad_x, partial, num_rows, width,
            others.stride(0), grad.stride(0), x.stride(0), 1.0 / width,
            SIZE=size, STEPS=size.bit_length() - 1, ROWS=ROWS, ADD=grad_total is not None,
            num_warps=_warps(size), **UNFUSED,
        )  # fmt: skip
    gain_kernel[(triton.cdiv(width, COLUMNS),)](
        partial, grad_gain, num_blocks, width,
        BLOCKS=BLOCKS, STEPS=BLOCKS.bit_length() - 1, COLUMNS=COLUMNS, **UNFUSED,
    )  # fmt: skip
    return grad_x, grad_gain


@triton.jit
def _exp(x):
    x = tl.minimum(tl.maximum(x, _LOWEST), _HIGHEST)
    power = tl.floor(x * _LOG2_E + 0.5)
    rest = x - power * _LN2_HIGH - power * _LN2_LOW
    series = rest * _C7 + _C6
    series = series * rest + _C5
    series = series * rest + _C4
    series = series * rest + _C3
    series = series * rest + _C2
    series = series * rest + _C1
    series = series * rest + _C0
    return series * ((power.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def gate_kernel(gate, up, out, width, gate_stride, up_stride, BLOCK: tl.constexpr):
    DTYPE: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = column < width
    value = tl.load(gate + row * gate_stride + column, mask=in_bounds, other=0.0).to(tl.float32)
    factor_up = tl.load(up + row * up_stride + column, mask=in_bounds, other=0.0).to(tl.float32)
    activation = rounded(tl.div_rn(value, _exp(-value) + 1.0), DTYPE).to(tl.float32)
    tl.store(out + row * width + column, rounded(activation * factor_up, DTYPE), mask=in_bounds)


def gate_rows(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [R, F] → silu(gate), rounded to their dtype, times up, rounded."""
    gate, up, (num_rows, width) = _rows(gate), _rows(up), gate.shape
    out = gate.new_empty(num_rows, width)
    if out.numel():
        block = min(BLOCK, power_of_two(width))
        gate_kernel[(num_rows, triton.cdiv(width, block))](
            gate, up, out, width, gate.stride(0), up.stride(0), BLOCK=block, **UNFUSED
        )
    return out


@triton.jit
def gate_backward_kernel(
    grad, gate, up, grads, out, width, grad_stride, gate_stride, up_stride, BLOCK: tl.constexpr
):  # fmt: skip
    DTYPE: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = column < width
    upstream = tl.load(grad + row * grad_stride + column, mask=in_bounds, other=0.0).to(tl.float32)
    value = tl.load(gate + row * gate_stride + column, mask=in_bounds, other=0.0).to(tl.float32)
    factor_up = tl.load(up + row * up_stride + column, mask=in_bounds, other=0.0).to(tl.float32)
    denominator = _exp(-value) + 1.0
    activation = rounded(tl.div_rn(value, denominator), DTYPE).to(tl.float32)
    sigmoid = tl.div_rn(1.0, denominator)
    slope = sigmoid * ((1.0 - sigmoid) * value + 1.0)
    grad_activation = rounded(upstream * factor_up, DTYPE).to(tl.float32)
    start = grads + row * 2 * width + column
    tl.store(start, rounded(grad_activation * slope, DTYPE), mask=in_bounds)
    tl.store(start + width, rounded(activation * upstream, DTYPE), mask=in_bounds)
    tl.store(out + row * width + column, rounded(activation * factor_up, DTYPE), mask=in_bounds)


def gate_rows_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """→ the gradients of gate and up side by side [R, 2F], and the result of `gate_rows` [R, F]."""
    grad, gate, up, (num_rows, width) = _rows(grad), _rows(gate), _rows(up), gate.shape
    grads, out = gate.new_empty(num_rows, 2 * width), gate.new_empty(num_rows, width)
    if out.numel():
        block = min(BLOCK, power_of_two(width))
        gate_backward_kernel[(num_rows, triton.cdiv(width, block))](
            grad, gate, up, grads, out, width, grad.stride(0), gate.stride(0), up.stride(0), BLOCK=block, **UNFUSED
        )
    return grads, out
