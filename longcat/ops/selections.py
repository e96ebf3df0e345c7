"""Operators on a router's selections, without a scatter or a sort: a GPU would make either deterministic by sorting.

Counts are integers, and a token's selections are of different experts, so no sum has an order.
"""

# T tokens, K selections per token, N FFN experts, Z identity experts

from __future__ import annotations

import math
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


WIDEST = 4.0  # of a margin: probabilities and biases are at most so far apart
FINE = 64.0  # bins are about alike in width below 1/FINE of the mean probability, and in ratio above it


@operator("count_margins(Tensor probabilities, Tensor bias, int top_k, int bins, Tensor? padding=None) -> Tensor")
def count_margins(probabilities: Tensor, bias: Tensor, top_k: int, bins: int, padding: Tensor | None = None) -> Tensor:
    """Histograms of each expert's margins over the tokens: [N + Z, bins] int64, whose bounds are `margin_edges`.

    The margin is the token's (K+1)-th largest biased probability less the expert's: what its bias lacks, negative where
    the token selects the expert. Tokens where ``padding`` [T] is True do not count.

    probabilities [T, N + Z], bias [N + Z] float32; K < N + Z.
    """
    scores = probabilities + bias
    cutoff = torch.topk(scores, top_k + 1, -1).values[:, -1:]
    scale = FINE * scores.shape[1]
    places = torch.asinh((cutoff - scores).mul_(scale)).div_(math.asinh(WIDEST * scale)).add_(1).mul_(bins / 2)
    places = places.long().clamp_(0, bins - 1).t()
    counts = torch.zeros(places.shape[0], bins, dtype=torch.int64, device=places.device)
    weights = torch.ones_like(places)
    return counts.scatter_add_(1, places, weights if padding is None else weights.masked_fill_(padding, 0))


def margin_edges(num_routed: int, bins: int) -> Tensor:
    """The bounds of the bins of `count_margins`: [bins + 1] float64, ascending."""
    scale = FINE * num_routed
    places = torch.linspace(-1.0, 1.0, bins + 1, dtype=torch.float64)
    return torch.sinh(places * math.asinh(WIDEST * scale)) / scale


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
