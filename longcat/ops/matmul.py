"""Matrix products and linear layers with a backward of their own (the experts' are in `grouped.py`).

bfloat16 inputs are multiplied with float32 accumulation and rounded once, on every machine. A processor without
bfloat16 instructions runs torch's bfloat16 GEMM at about 1 % of its float32 rate, so there the operands are upcast
(which is exact), multiplied in float32 and rounded: the same contract at float32 speed.

A float32 weight is cast to the dtype of x where it is multiplied, in the forward and again in the backward, so that no
second copy of the weights outlives a product.
"""

# T rows (tokens), I input width, O output width

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longcat.faults import Place, passed
from longcat.ops.calls import named, observed
from longcat.ops.elementwise import swiglu, swiglu_backward
from longcat.ops.permuted import matmul, mm_float32
from longcat.ops.rotation import rotate_heads, rotate_heads_back
from longcat.ops.torch_internals import cpu_has_amx_tiles, cpu_has_avx512_bf16

StoreWeightGrad = Callable[[Callable[[], Tensor]], None]  # stores the computation of a weight's gradient, for later


def cpu_multiplies_bfloat16() -> bool:
    """Whether this processor has bfloat16 dot products (AVX512-BF16 or AMX, or Arm's BF16)."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    return cpu_has_avx512_bf16() or "SVE" in capabilities


def cpu_has_amx() -> bool:
    """Whether this processor has AMX, whose matrix tiles multiply bfloat16 several times faster still."""
    return cpu_has_amx_tiles()


_NATIVE_BFLOAT16 = cpu_multiplies_bfloat16()  # a constant, so that torch.compile need not trace the probe


def upcast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in float32 if they are bfloat16 and this processor multiplies that slowly, else as they are."""
    first = tensors[0]
    if first.dtype is torch.bfloat16 and first.device.type == "cpu" and not _NATIVE_BFLOAT16:
        return tuple(tensor.float() for tensor in tensors)
    return tensors


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for matrices or batches of them, float32 accumulation, in the dtype of ``a``."""
    a_upcast, b_upcast = upcast(a, b)
    return matmul(a_upcast, b_upcast).to(a.dtype)


def raw_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the dtype of this processor's GEMM, for a caller that upcasts the result to float32 next."""
    return matmul(*upcast(a, b))


def writes_float32(device_type: str, dtype: torch.dtype) -> bool:
    """Whether products of ``dtype`` come in float32, unrounded, and can be added to float32: cuBLAS does that."""
    return device_type != "cpu" and dtype in (torch.bfloat16, torch.float16)


def logits_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for matrices: in float32 where the product can be written so, else as `raw_product`."""
    if writes_float32(a.device.type, a.dtype):
        return mm_float32(a, b)
    return raw_product(a, b)


def input_of(inputs: Sequence[Tensor]) -> Tensor:
    """The input x of a product whose ``inputs`` are x, or the gate and up of a SwiGLU."""
    return inputs[0] if len(inputs) == 1 else swiglu(*inputs)


def input_and_gradients(
    needed: tuple[bool, ...], inputs: list[Tensor], grad_of_x: Callable[[], Tensor]
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """`input_of` the inputs, and the gradients of the inputs.

    ``grad_of_x`` computes the gradient of x; ``needed`` says which inputs need theirs.
    """
    if not any(needed):
        return input_of(inputs), (None,) * len(inputs)
    if len(inputs) == 1:
        return inputs[0], (grad_of_x(),)
    grad_gate, grad_up, x = swiglu_backward(grad_of_x(), *inputs)
    return x, (grad_gate, grad_up)


@observed("linear")
class _Linear(torch.autograd.Function):
    """The inputs are x, or the gate and up of a SwiGLU whose result is not saved: the backward recomputes it.

    With ``angles``, the last columns of each head of the result are rotated, on a GPU, where they were written.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        store: StoreWeightGrad | None,
        angles: Tensor | None,
        head_width: int,
        *inputs: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(weight, angles, *inputs)
        ctx.store, ctx.head_width = store, head_width
        x = input_of(inputs)
        out = product(x.reshape(-1, x.shape[-1]), weight.to(x.dtype).t()).view(*x.shape[:-1], weight.shape[0])
        if angles is not None:
            rotate_heads(out, head_width, angles)
        return passed(Place.activation, "linear", out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, angles, *inputs = ctx.saved_tensors
        grad_out = grads[0] if angles is None else rotate_heads_back(grads[0], ctx.head_width, angles)
        grad = grad_out.reshape(-1, weight.shape[0])

        def grad_of_x() -> Tensor:
            grad_x = product(grad, weight.to(grad.dtype))
            return passed(Place.gradient, "linear", grad_x).view(inputs[0].shape)

        x, grad_inputs = input_and_gradients(ctx.needs_input_grad[4:], inputs, grad_of_x)
        grad_w = None
        if ctx.store is not None or ctx.needs_input_grad[0]:
            grad_w = compute_or_store(
                ctx.store,
                lambda: _weight_gradient(grad, x.reshape(-1, x.shape[-1])),
            )
        return grad_w, None, None, None, *grad_inputs


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """grad [T, O], x [T, I] → [O, I]."""
    return passed(Place.gradient, "linear weight", product(grad.t(), x))


_weight_gradient = named("linear weight", weight_gradient)


def compute_or_store(store: StoreWeightGrad | None, compute: Callable[[], Tensor]) -> Tensor | None:
    """A weight's gradient, or None where its computation is stored for later."""
    if store is None:
        return compute()
    store(compute)
    return None


def detach_if_deferred(weight: Tensor, store: StoreWeightGrad | None, *inputs: Tensor) -> Tensor:
    """The weight, detached from autograd's graph where its gradient is deferred: the graph would only carry zeros."""
    return weight.detach() if store is not None and any(x.requires_grad for x in inputs) else weight


def linear(x: Tensor, weight: Tensor, store: StoreWeightGrad | None = None) -> Tensor:
    """x [..., I], weight [O, I] → [..., O]. ``store`` defers the weight's gradient: it takes the computation."""
    return _Linear.apply(detach_if_deferred(weight, store, x), store, None, 0, x)


def gated_linear(gate: Tensor, up: Tensor, weight: Tensor, store: StoreWeightGrad | None = None) -> Tensor:
    """`linear` of x = silu(gate) · up [..., I], which autograd does not save."""
    return _Linear.apply(detach_if_deferred(weight, store, gate, up), store, None, 0, gate, up)


def rotated_linear(
    x: Tensor, weight: Tensor, head_width: int, angles: Tensor, store: StoreWeightGrad | None = None
) -> Tensor:
    """`linear` of x [B, q, I], each head's last columns rotated by ``angles`` [q, R/2]; on a GPU only.

    The rotation reads and writes nothing but these columns.
    """
    return _Linear.apply(detach_if_deferred(weight, store, x), store, angles, head_width, x)
