"""RMSNorm and SwiGLU; their backwards recompute what is cheap instead of saving it."""

# T rows (tokens), D width, F expert or FFN width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from longcat.faults import Place, passed, passed_all
from longcat.ops import fusion
from longcat.ops.calls import observed
from longcat.ops.fusion import Fusible, Permutable
from longcat.ops.one_pass import (
    add_norm_rows,
    add_norm_rows_backward,
    add_three,
    gate_rows,
    gate_rows_backward,
    norm_rows,
    norm_rows_backward,
)
from longcat.ops.permuted import along, elementwise, mirrored
from longcat.ops.torch_internals import storage_key


@Fusible
def _norm(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A product of x and a float32 tensor is float32 without an upcast copy of x."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = torch.rsqrt(length.square_().div_(x.shape[-1]).add_(eps))
    return (x * inverse).to(x.dtype) * gain.to(x.dtype), inverse


@_norm.on_gpu_by
def _norm_on_gpu(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, inverse = norm_rows(x.reshape(-1, x.shape[-1]), gain, eps)
    return out.view(x.shape), inverse.view(*x.shape[:-1], 1)


@_norm.permuted_by
def _norm_permuted(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """A CPU's sums over a row keep their order, so it rolls rows alone; a GPU's are by halves."""
    if not fusion.is_on_gpu(x):
        return along(-2, lambda rows: _norm.compute(rows, gain, eps), x)  # type: ignore[no-any-return]
    out, inverse = along(-2, lambda rows: _norm.compute(rows, mirrored(gain), eps), mirrored(x))
    return mirrored(out), inverse


@Fusible
def _norm_backward(grad: Tensor, x: Tensor, gain: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    normed = x * inverse
    grad_gain = (grad * normed).reshape(-1, gain.shape[0]).sum(0).to(gain.dtype)
    grad_normed = grad * gain.to(x.dtype).float()
    mean = (grad_normed * normed).sum(-1, keepdim=True).div_(x.shape[-1])
    return grad_normed.sub_(normed.mul_(mean)).mul_(inverse).to(x.dtype), grad_gain


@_norm_backward.on_gpu_by
def _norm_backward_on_gpu(grad: Tensor, x: Tensor, gain: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    rows = (one.reshape(-1, one.shape[-1]) for one in (grad, x))
    grad_x, grad_gain = norm_rows_backward(*rows, gain, inverse.reshape(-1, 1))
    return grad_x.view(x.shape), grad_gain


@_norm_backward.permuted_by
def _norm_backward_permuted(grad: Tensor, x: Tensor, gain: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """The gain's gradient sums over rows, which keep their order; on a CPU it is computed again as it was."""
    run = _norm_backward.compute
    if fusion.is_on_gpu(x):
        grad, x, gain = mirrored(grad), mirrored(x), mirrored(gain)
    grad_x = along(-2, lambda grad, x, inverse: run(grad, x, gain, inverse)[0], grad, x, inverse)
    grad_gain = run(grad, x, gain, inverse)[1]
    return (mirrored(grad_x), mirrored(grad_gain)) if fusion.is_on_gpu(x) else (grad_x, grad_gain)


@Permutable
def _add_norm(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return add_norm_rows(x, y, gain, eps)  # type: ignore[no-any-return]


@_add_norm.permuted_by
def _add_norm_permuted(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = mirrored(x), mirrored(y)
    total, out, inverse = along(0, lambda x, y: _add_norm.compute(x, y, mirrored(gain), eps), *rows)
    return mirrored(total), mirrored(out), inverse


@Permutable
def _add_norm_backward(
    grad_total: Tensor, grad: Tensor, total: Tensor, gain: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    return add_norm_rows_backward(grad_total, grad, total, gain, inverse)  # type: ignore[no-any-return]


@_add_norm_backward.permuted_by
def _add_norm_backward_permuted(
    grad_total: Tensor, grad: Tensor, total: Tensor, gain: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """As `_norm_backward_permuted`."""
    run, gain = _add_norm_backward.compute, mirrored(gain)
    rows = mirrored(grad_total), mirrored(grad), mirrored(total), inverse
    grad_x = along(0, lambda grad_total, grad, total, inverse: run(grad_total, grad, total, gain, inverse)[0], *rows)
    return mirrored(grad_x), mirrored(run(*rows[:3], gain, inverse)[1])


@Permutable
def sum_of_three(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """(x + y) + z of tensors [..., D], each sum rounded; called inside autograd functions."""
    return add_three(x, y, z)  # type: ignore[no-any-return]


@sum_of_three.permuted_by
def _sum_of_three_permuted(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return elementwise(sum_of_three.compute, x, y, z)  # type: ignore[no-any-return]


@observed("norm")
class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        out, inverse = _norm(x, gain, eps)
        ctx.save_for_backward(x, gain, inverse)
        return passed(Place.activation, "norm", out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return *passed_all(Place.gradient, "norm", _norm_backward(grads[0], *ctx.saved_tensors)), None


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) in float32, cast to x's dtype, times ``gain`` [D]: the order of the released model."""
    return _RMSNorm.apply(x, gain, eps)


@observed("added_norm")
class _AddedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total, out, inverse = _add_norm(_rows(x), _rows(y), gain, eps)
        total, out = total.view(x.shape), out.view(x.shape)
        ctx.save_for_backward(total, gain, inverse)
        return total, passed(Place.activation, "norm", out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total, gain, inverse = ctx.saved_tensors
        grad_x, grad_gain = _add_norm_backward(_rows(grads[0]), _rows(grads[1]), _rows(total), gain, inverse)
        grad_x, grad_gain = passed_all(Place.gradient, "norm", (grad_x.view(total.shape), grad_gain))
        return grad_x, grad_x, grad_gain, None


def added_norm(x: Tensor, y: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + y and its `rms_norm`, on a GPU in one pass."""
    return _AddedNorm.apply(x, y, gain, eps)  # type: ignore[no-any-return]


@observed("residual_sum")
class _ResidualSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        # No view: FSDP2 warns of a module that returns one
        return passed(Place.activation, "residual sum", sum_of_three(x, y, z))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return grads[0], grads[0], grads[0]


def residual_sum(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """(x + y) + z of tensors [..., D], on a GPU in one pass."""
    return _ResidualSum.apply(x, y, z) if fusion.is_on_gpu(x) else (x + y) + z


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


@Fusible
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, called inside the autograd functions of the product that follows (`matmul`, `grouped`)."""
    return silu(gate).mul_(up)


@swiglu.on_gpu_by
def _swiglu_on_gpu(gate: Tensor, up: Tensor) -> Tensor:
    rows = (one.reshape(-1, gate.shape[-1]) for one in (gate, up))
    return gate_rows(*rows).view(gate.shape)  # type: ignore[no-any-return]


@swiglu.permuted_by
def _swiglu_permuted(gate: Tensor, up: Tensor) -> Tensor:
    return elementwise(swiglu.compute, gate, up)  # type: ignore[no-any-return]


@Fusible
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """→ the gradients of gate and up, and silu(gate) · up recomputed."""
    activation = silu(gate)
    return torch.ops.aten.silu_backward(grad * up, gate), activation * grad, activation * up


@swiglu_backward.on_gpu_by
def _swiglu_backward_on_gpu(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients are the halves of one tensor."""
    rows = (one.reshape(-1, gate.shape[-1]) for one in (grad, gate, up))
    grads, x = gate_rows_backward(*rows)
    grad_gate, grad_up = grads.view(*gate.shape[:-1], grads.shape[-1]).chunk(2, -1)
    return grad_gate, grad_up, x.view(gate.shape)


@swiglu_backward.permuted_by
def _swiglu_backward_permuted(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return elementwise(swiglu_backward.compute, grad, gate, up)  # type: ignore[no-any-return]


def joined_swiglu(gate_up: Tensor) -> Tensor:
    """`swiglu` of the halves of gate_up [P, 2F]."""
    return swiglu(*gate_up.chunk(2, -1))


def joined_swiglu_backward(grad: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """→ the gradient of gate_up [P, 2F], and `joined_swiglu` recomputed."""
    grad_gate, grad_up, x = swiglu_backward(grad, *gate_up.chunk(2, -1))
    width = grad_gate.shape[-1]
    one = storage_key(grad_gate.untyped_storage()) == storage_key(grad_up.untyped_storage())
    if one and grad_up.storage_offset() == grad_gate.storage_offset() + width:  # on a GPU
        return grad_gate.as_strided(gate_up.shape, (2 * width, 1)), x
    return torch.cat((grad_gate, grad_up), -1), x
