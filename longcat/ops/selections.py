"""Operators on a router's selections, without a scatter or a sort: a GPU would make either deterministic by sorting.

Counts are integers, and a token's selections are of different experts, so no sum has an order.
"""

# T tokens, K selections per token, N FFN experts, Z identity experts

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longcat.faults import Place, passed
from longcat.ops.calls import observed
from longcat.ops.torch_library import operator


@operator("count_selections(Tensor indices, int num_routed) -> Tensor")
def count_selections(indices: Tensor, num_routed: int) -> Tensor:
    """indices [T, K] → selections of each expert [N + Z] int64."""
    flat = indices.reshape(-1)
    counts = torch.zeros(num_routed, dtype=torch.int64, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))


@operator("spread_gates(Tensor grad, Tensor indices, int num_routed) -> Tensor")
def spread_gates(grad: Tensor, indices: Tensor, num_routed: int) -> Tensor:
    """grad, indices [T, K] → [T, N + Z], zero where a token has not selected an expert; the adjoint of a gather."""
    return grad.new_zeros(grad.shape[0], num_routed).scatter_add_(1, indices, grad)


@observed("gates")
class _SelectedGates(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, probabilities: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.num_routed = probabilities.shape[1]
        return passed(Place.activation, "gates", probabilities.gather(1, indices))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        return passed(Place.gradient, "gates", spread_gates(grads[0].contiguous(), indices, ctx.num_routed)), None


def selected_gates(probabilities: Tensor, indices: Tensor) -> Tensor:
    """probabilities [T, N + Z] at each token's different ``indices`` [T, K] → [T, K]."""
    return _SelectedGates.apply(probabilities, indices)  # type: ignore[no-any-return]
