"""The router's linear layer, in float32; on a GPU from products of bfloat16 parts.

There each float32 operand is the exact sum of three bfloat16 parts: a float32 number has 24 significant bits, a
bfloat16 number 8. The products of parts are exact and are added in float32. Tensor cores do that many times faster
than a GPU's float32 units multiply. Numbers below 2^-110 lose their last bits, and an infinite one gives NaN.
"""

# T rows (tokens), I input width, O output width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longcat.faults import Place, passed, passed_all
from longcat.ops.calls import observed
from longcat.ops.elementwise import sum_of_three
from longcat.ops.fusion import Permutable
from longcat.ops.matmul import writes_float32
from longcat.ops.one_pass import split_rows
from longcat.ops.permuted import matmul, mm_float32, rolled

# Pairs of parts whose products are not below the last bit of the largest, smallest first: 0 is the largest part
PAIRS = ((2, 0), (1, 1), (0, 2), (1, 0), (0, 1), (0, 0))


def multiplies_in_parts(device_type: str, dtype: torch.dtype) -> bool:
    """Whether a float32 matrix is multiplied with rows of ``dtype`` in three parts."""
    return dtype is torch.bfloat16 and writes_float32(device_type, dtype)


@Permutable
def _split(x: Tensor) -> Tensor:
    """x [R, D] float32 → its three parts one below another [3 R, D]."""
    return split_rows(x)  # type: ignore[no-any-return]


@_split.permuted_by
def _split_permuted(x: Tensor) -> Tensor:
    parts = _split.compute(rolled(rolled(x, 0), 1)).unflatten(0, (3, x.shape[0]))
    return rolled(rolled(parts, -1, back=True), -2, back=True).flatten(0, 1)


def split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x float32 → three bfloat16 tensors, the largest first, whose sum is x."""
    return _split(x).chunk(3)  # type: ignore[return-value]


def split_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, I] bfloat16, weight [O, I] float32 → x weightᵀ [T, O] float32, the smallest parts added first."""
    large, middle, small = _product(x, _split(weight).t()).chunk(3, 1)
    return sum_of_three(small, middle, large)


def split_input_gradient(grad: Tensor, weight: Tensor) -> Tensor:
    """grad [T, O], weight [O, I] float32 → grad weight [T, I] float32, without the products below its last bit."""
    of_grad, of_weight = split(grad), split(weight)
    left = torch.cat([of_grad[first] for first, _ in PAIRS], 1)
    return _product(left, torch.cat([of_weight[second] for _, second in PAIRS]))


def split_weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad [T, O] float32, x [T, I] bfloat16 → gradᵀ x [O, I] float32."""
    large, middle, small = _product(torch.cat(split(grad), 1).t(), x).chunk(3)
    return sum_of_three(small, middle, large)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of bfloat16 matrices in float32; where no product is written so, of their float32 copies."""
    return mm_float32(a, b) if writes_float32(a.device.type, a.dtype) else matmul(a.float(), b.float())


@observed("router")
class _Fp32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        in_parts = multiplies_in_parts(x.device.type, x.dtype)
        out = split_linear(x, weight) if in_parts else matmul(x.float(), weight.t())
        return passed(Place.activation, "router", out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        in_parts = multiplies_in_parts(x.device.type, x.dtype)
        grad_x = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_x = (split_input_gradient(grads[0], weight) if in_parts else matmul(grads[0], weight)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_w = split_weight_gradient(grads[0], x) if in_parts else matmul(grads[0].t(), x.float())
        return passed_all(Place.gradient, "router", (grad_x, grad_w))


def fp32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, I] in any dtype, weight [O, I] float32 → [T, O] float32; no upcast copy of x outlives the product."""
    return _Fp32Linear.apply(x, weight)
