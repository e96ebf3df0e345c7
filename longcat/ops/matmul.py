"""Matrix products: linear layers whose backward this project controls (experts' are in `grouped.py`).

bfloat16 inputs are multiplied with float32 accumulation and rounded once, on every machine. A processor without
bfloat16 instructions runs torch's bfloat16 GEMM at about 1 % of its float32 rate, so there the operands are widened
(which is exact), multiplied in float32 and rounded: the same contract, at float32 speed.

A float32 weight is cast to the dtype of x where it is multiplied, in the forward and again in the backward, so that no
second copy of the weights outlives a product.
"""

# T rows (tokens), I input width, O output width

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longcat.ops.elementwise import swiglu, swiglu_backward

Defer = Callable[[Callable[[], Tensor]], None]  # takes a computation of a weight's gradient


def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has bfloat16 dot products (AVX512-BF16 or AMX, or Arm's BF16)."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe()) or "SVE" in capabilities


def cpu_has_amx() -> bool:
    """Whether this processor has a unit for matrix tiles, which multiplies bfloat16 several times faster still."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())


_NATIVE_BFLOAT16 = cpu_multiplies_bfloat16()  # known before any graph is traced


def upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In float32 where this processor would multiply bfloat16 slowly."""
    first = tensors[0]
    if first.dtype is torch.bfloat16 and first.device.type == "cpu" and not _NATIVE_BFLOAT16:
        return tuple(tensor.float() for tensor in tensors)
    return tensors


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for matrices or batches of them, float32 accumulation, in the dtype of ``a``."""
    wide_a, wide_b = upcast(a, b)
    return torch.matmul(wide_a, wide_b).to(a.dtype)


def raw_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the dtype in which this processor's GEMM leaves it, for what is widened to float32 next."""
    return torch.matmul(*upcast(a, b))


def input_of(inputs: Sequence[Tensor]) -> Tensor:
    """Input x of a product whose ``inputs`` are x, or the gate and up of a SwiGLU."""
    return inputs[0] if len(inputs) == 1 else swiglu(*inputs)


def input_and_gradients(
    needed: tuple[bool, ...], inputs: list[Tensor], of_x: Callable[[], Tensor]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """`input_of` the inputs, and the gradients of the inputs.

    ``of_x`` computes the gradient of x; ``needed`` says which inputs want theirs.
    """
    if not any(needed):
        return input_of(inputs), (None,) * len(inputs)
    if len(inputs) == 1:
        return inputs[0], (of_x(),)
    grad_gate, grad_up, x = swiglu_backward(of_x(), *inputs)
    return x, (grad_gate, grad_up)


class _Linear(torch.autograd.Function):
    """The inputs are x, or the gate and up of a SwiGLU whose result is not saved: the backward computes it again."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, put: Defer | None, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(weight, *inputs)
        ctx.put = put
        x = input_of(inputs)
        return product(x.reshape(-1, x.shape[-1]), weight.to(x.dtype).t()).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        grad = grads[0].reshape(-1, weight.shape[0])

        def of_x() -> Tensor:
            return product(grad, weight.to(grad.dtype)).view(inputs[0].shape)

        x, grad_inputs = input_and_gradients(ctx.needs_input_grad[2:], inputs, of_x)
        grad_w = None
        if ctx.put is not None or ctx.needs_input_grad[0]:
            grad_w = compute_or_defer(ctx.put, lambda: product(grad.t(), x.reshape(-1, x.shape[-1])))
        return grad_w, None, *grad_inputs


def compute_or_defer(put: Defer | None, compute: Callable[[], Tensor]) -> Tensor | None:
    """A weight's gradient, or None where it is left for later."""
    if put is None:
        return compute()
    put(compute)
    return None


def source_of(weight: Tensor, put: Defer | None, *inputs: Tensor) -> Tensor:
    """Without a way back in autograd's graph where the gradient is put off: it would carry zeros."""
    return weight.detach() if put is not None and any(x.requires_grad for x in inputs) else weight


def linear(x: Tensor, weight: Tensor, put: Defer | None = None) -> Tensor:
    """x [..., I], weight [O, I] → [..., O]. ``put`` takes the computation of the weight's gradient, for later."""
    return _Linear.apply(source_of(weight, put, x), put, x)  # type: ignore[no-any-return]


def gated_linear(gate: Tensor, up: Tensor, weight: Tensor, put: Defer | None = None) -> Tensor:
    """`linear` of x = silu(gate) · up [..., I], which no graph keeps."""
    return _Linear.apply(source_of(weight, put, gate, up), put, gate, up)  # type: ignore[no-any-return]


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.linear(x.float(), weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = (grads[0] @ weight).to(x.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, grads[0].t() @ x.float() if ctx.needs_input_grad[1] else None


def wide_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, I] in any dtype, weight [O, I] float32 → [T, O] float32; no widened copy of x outlives the product."""
    return _WideLinear.apply(x, weight)  # type: ignore[no-any-return]
