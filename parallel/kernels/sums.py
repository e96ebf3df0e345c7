"""Kernels of the sums of `longcat/ops/one_pass.py`: three tensors added, and one in three parts."""

# R rows, D width

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from parallel.kernels.common import UNFUSED, power_of_two, rounded

BLOCK = 1024  # columns of a program


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


@triton.jit
def add_kernel(x, y, z, out, width, x_stride, y_stride, z_stride, BLOCK: tl.constexpr):
    DTYPE: tl.constexpr = out.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = column < width
    first = tl.load(x + row * x_stride + column, mask=in_bounds, other=0.0).to(tl.float32)
    second = tl.load(y + row * y_stride + column, mask=in_bounds, other=0.0).to(tl.float32)
    third = tl.load(z + row * z_stride + column, mask=in_bounds, other=0.0).to(tl.float32)
    total = rounded(first + second, DTYPE).to(tl.float32) + third
    tl.store(out + row * width + column, rounded(total, DTYPE), mask=in_bounds)


def add_three(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x, y, z [..., D] → x + y, rounded to their dtype, + z, rounded."""
    out = x.new_empty(x.shape)
    x, y, z = (_rows(one.reshape(-1, one.shape[-1])) for one in (x, y, z))
    num_rows, width = x.shape
    if out.numel():
        block = min(BLOCK, power_of_two(width))
        add_kernel[(num_rows, triton.cdiv(width, block))](
            x, y, z, out, width, x.stride(0), y.stride(0), z.stride(0), BLOCK=block, **UNFUSED
        )
    return out


@triton.jit
def split_kernel(x, out, num_rows, width, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_bounds = column < width
    value = tl.load(x + row * stride + column, mask=in_bounds, other=0.0)
    large = rounded(value, tl.bfloat16)
    rest = value - large.to(tl.float32)
    middle = rounded(rest, tl.bfloat16)
    small = rounded(rest - middle.to(tl.float32), tl.bfloat16)
    tl.store(out + row * width + column, large, mask=in_bounds)
    row += num_rows  # which has no methods where it is 1: a launch makes a constant of it
    tl.store(out + row * width + column, middle, mask=in_bounds)
    row += num_rows
    tl.store(out + row * width + column, small, mask=in_bounds)


def split_rows(x: Tensor) -> Tensor:
    """x [R, D] float32 → three bfloat16 parts one below another [3 R, D], the largest first, whose sum is x."""
    x, (num_rows, width) = _rows(x), x.shape
    out = x.new_empty(3 * num_rows, width, dtype=torch.bfloat16)
    if out.numel():
        block = min(BLOCK, power_of_two(width))
        split_kernel[(num_rows, triton.cdiv(width, block))](
            x, out, num_rows, width, x.stride(0), BLOCK=block, **UNFUSED
        )
    return out
