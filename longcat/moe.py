"""The mixture of experts: router, zero-computation experts, stacked SwiGLU experts.

`MoE` is used in four calls, in the order in which the layer overlaps them with its dense path: `dispatch`
starts the exchange, `send` is the last moment for what the host had to wait for, `compute` waits for the tokens,
computes and starts the way back, `combine` waits for that. In one process the exchange does nothing.
"""

# T tokens held here, K chosen, N FFN experts, Z identity experts, E FFN experts held here, P rows for them,
# D width, F expert width

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longcat.config import ModelConfig
from longcat.dispatch import LocalDispatcher, Routing
from longcat.interfaces import DispatcherModule, SequenceModule, WeightGradModule, local_tensor
from longcat.layers import Linear, deferral
from longcat.ops.grouped import grouped_gated_linear, grouped_linear
from longcat.ops.matmul import fp32_linear


class RoutingStatistics(NamedTuple):
    """What one layer reports of one micro-batch; returned, not stored, so that a recomputed layer counts once."""

    balance: Tensor  # scalar, the tokens' part of Σ_j f_j P_j, the balance loss without its weight α
    balance_slope: Tensor  # [N + Z], its derivative by the mean probability of each expert: f of its group
    counts: Tensor  # [N + Z] int64, the tokens' selections of each expert
    ffn_experts: Tensor  # [T] int64, FFN experts of each token


class Router(nn.Module):
    """Softmax over N+Z in float32; the bias chooses and never weighs (section 3 of the equations)."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.classifier = Linear(config.hidden_size, config.num_routed)
        self.register_buffer("e_score_correction_bias", torch.empty(config.num_routed))
        self.gate_slope: Tensor | None = None  # set to zeros [N + Z] to gather Σ_t ∂loss/∂R_t in the backward
        self.direction: Tensor | None = None  # [D] float64, with gate_slope set: Σ of the rows, each scaled to length 1

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u [T, D] → probabilities R [T, N+Z], chosen experts [T, K], gates γ·R [T, K]; all float32."""
        weight = local_tensor(self.classifier.weight).float()
        if self.gate_slope is not None and self.direction is None:
            self.direction = torch.nn.functional.normalize(weight.detach().double(), dim=1).sum(0)
        logits = fp32_linear(u, weight)
        probabilities = torch.softmax(logits, -1)
        with torch.no_grad():
            choice = probabilities + self.e_score_correction_bias
            indices = torch.topk(choice, self.config.top_k, -1, sorted=False).indices
        weighing = probabilities
        if self.gate_slope is not None and probabilities.requires_grad:
            weighing = probabilities.view_as(probabilities)
            weighing.register_hook(self._gather_slope)
        return probabilities, indices, weighing.gather(1, indices) * self.config.routed_scaling_factor

    def _gather_slope(self, grad: Tensor) -> None:
        if self.gate_slope is not None:
            self.gate_slope += grad.sum(0)


class Experts(WeightGradModule):
    """Stacked SwiGLU experts: gate_up [N, 2F, D], down [N, D, F]; a process may hold E of the N."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num, width, hidden = config.num_experts, config.hidden_size, config.expert_hidden_size
        self.gate_up = nn.Parameter(torch.empty(num, 2 * hidden, width))
        self.down = nn.Parameter(torch.empty(num, width, hidden))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows [P, D] sorted by expert, counts [E] → [P, D]."""
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = grouped_linear(rows, local_tensor(self.gate_up), ends, deferral(self, "gate_up")).chunk(2, -1)
        return grouped_gated_linear(gate, up, local_tensor(self.down), ends, deferral(self, "down"))


@dataclass
class PendingMoE:
    """A mixture of experts between its calls."""

    chunks: list[Any]  # what the dispatcher has under way, one for each chunk of tokens
    probabilities: Tensor  # [T, N + Z]
    indices: Tensor  # [T, K]
    counts: Tensor  # [N + Z]
    total: Any  # the counts' sum over the micro-batch, under way


class MoE(SequenceModule, DispatcherModule):
    """Σ over the chosen experts of gate · expert(u), as dispatch, experts, combine."""

    def __init__(self, config: ModelConfig, balance_groups: int) -> None:
        super().__init__()
        self.config = config
        self.balance_groups = balance_groups
        self.router = Router(config)
        self.experts = Experts(config)
        self.num_chunks = 1  # of the tokens, so that exchange and experts of different chunks overlap
        self.after_attention = False  # where the layer computes the experts: after its first FFN, or its attention 1
        self.expert_stream: Callable[[], AbstractContextManager[Any]] = (
            nullcontext  # around the experts: where they are queued
        )
        self.dispatcher = LocalDispatcher()

    def dispatch(self, u: Tensor) -> PendingMoE:
        """Route u [T, D] and start sending the tokens of FFN experts; identity experts' tokens stay."""
        sizes = self.config.num_experts, self.config.num_routed
        probabilities, indices, gates = self.router(u)
        parts = zip(*(whole.tensor_split(self.num_chunks) for whole in (u, indices, gates)), strict=True)
        chunks = self.dispatcher.start([(x, Routing(index, gate, *sizes)) for x, index, gate in parts])
        counts = torch.zeros(self.config.num_routed, dtype=torch.int64, device=u.device)
        counts.scatter_add_(0, indices.flatten(), torch.ones_like(indices.flatten()))  # integers: any order will do
        return PendingMoE(chunks, probabilities, indices, counts, self.sequence.start_count(counts))

    def send(self, pending: PendingMoE) -> None:
        """Send what is still here; what covers the host's wait for the numbers of rows has been queued by now."""
        for chunk in pending.chunks:
            self.dispatcher.send(chunk)

    def compute(self, pending: PendingMoE) -> PendingMoE:
        """Wait for the rows, run the experts on them and start the way back."""
        with self.expert_stream():
            for place, chunk in enumerate(pending.chunks):
                rows, counts = self.dispatcher.wait(chunk)
                pending.chunks[place] = self.dispatcher.start_back(self.experts(rows, counts), chunk)
        return pending

    def combine(self, pending: PendingMoE) -> tuple[Tensor, RoutingStatistics]:
        """Wait for the results → [T, D], and what the router did."""
        parts = [self.dispatcher.wait_back(chunk) for chunk in pending.chunks]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        total = self.sequence.wait_count(pending.total)
        num_tokens = pending.probabilities.shape[0] * self.sequence.num_shards
        slope = balance_slope(total, num_tokens, self.config, self.balance_groups)
        balance = (pending.probabilities.sum(0) / num_tokens * slope).sum()
        used = (pending.indices < self.config.num_experts).sum(1)
        return out, RoutingStatistics(balance, slope, pending.counts, used)


def balance_slope(counts: Tensor, num_tokens: int, config: ModelConfig, num_groups: int) -> Tensor:
    """f of each expert's group [N + Z] in the device-level balance loss Σ_j f_j P_j (section 5).

    Counts are the selections of the micro-batch's ``num_tokens``. With no identity experts, or none expected, their
    group is absent.
    """
    num_experts, expected = config.num_experts, config.expected_ffn_experts
    size = num_experts // num_groups
    by_group = counts[:num_experts].view(num_groups, size).sum(1).float()
    slope = (by_group * (num_groups / (expected * num_tokens))).repeat_interleave(size)
    identity = torch.zeros(config.num_zero_experts, device=slope.device)
    if config.top_k > expected:
        share = counts[num_experts:].sum().float() / ((config.top_k - expected) * num_tokens)
        identity = identity + share
    return torch.cat((slope, identity))
