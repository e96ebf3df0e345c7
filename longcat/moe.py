"""The mixture of experts: router, zero-computation experts, stacked SwiGLU experts, and the exchange seam.

`MoE` is used in three calls, in the order in which the layer overlaps them with its dense path: `dispatch`
starts the exchange, `compute` waits for it, computes and starts the way back, `combine` waits for that. In one
process the exchange does nothing.
"""

# T tokens, K chosen, N FFN experts, Z identity experts, P rows (FFN selections), D width, F expert width

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from longcat.config import ModelConfig
from longcat.layers import Linear
from longcat.ops.elementwise import swiglu
from longcat.ops.matmul import grouped_linear
from longcat.ops.permute import Permutation, combine, permute, plan_permutation


class RoutingStatistics(NamedTuple):
    """What one layer reports of one micro-batch; returned, not stored, so that a recomputed layer counts once."""

    balance: Tensor  # scalar, Σ_j f_j P_j of the device-level balance loss (without its weight α)
    balance_slope: Tensor  # [N + Z], its derivative by the mean probability of each expert: f of its group
    counts: Tensor  # [N + Z] int64, selections of each expert
    ffn_experts: Tensor  # [T] int64, FFN experts of each token


class Exchange(Protocol):
    """Moves rows to the ranks of their experts and back. Both ways are a start, which returns at once, and a wait."""

    def start(self, rows: Tensor, counts: Tensor) -> Any:
        """rows [P, D] sorted by expert and counts [N] int64 of each expert → handle."""

    def wait(self, handle: Any) -> tuple[Tensor, Tensor]:
        """→ the rows for this rank's experts, sorted by expert, and how many each has."""

    def start_back(self, rows: Tensor, handle: Any) -> Any:
        """Rows in the order that `wait` gave → handle."""

    def wait_back(self, handle: Any) -> Tensor:
        """→ rows [P, D] in the order that `start` took."""


class LocalExchange:
    """The exchange of one process: every expert is here."""

    def start(self, rows: Tensor, counts: Tensor) -> Any:
        return rows, counts

    def wait(self, handle: Any) -> tuple[Tensor, Tensor]:
        return handle  # type: ignore[no-any-return]

    def start_back(self, rows: Tensor, handle: Any) -> Any:
        return rows

    def wait_back(self, handle: Any) -> Tensor:
        return handle  # type: ignore[no-any-return]


class Router(nn.Module):
    """Softmax over N+Z in float32; the bias chooses and never weighs (section 3 of the equations)."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.classifier = Linear(config.hidden_size, config.num_routed)
        self.register_buffer("e_score_correction_bias", torch.empty(config.num_routed))
        self.gate_slope: Tensor | None = None  # set to zeros [N + Z] to gather Σ_t ∂loss/∂R_t in the backward

    def forward(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u [T, D] → probabilities R [T, N+Z], chosen experts [T, K], gates γ·R [T, K]; all float32."""
        logits = torch.nn.functional.linear(u.float(), self.classifier.weight.float())
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


class Experts(nn.Module):
    """Stacked SwiGLU experts: gate_up [E, 2F, D], down [E, D, F]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num, width, hidden = config.num_experts, config.hidden_size, config.expert_hidden_size
        self.gate_up = nn.Parameter(torch.empty(num, 2 * hidden, width))
        self.down = nn.Parameter(torch.empty(num, width, hidden))

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """rows [P, D] sorted by expert, counts [E] → [P, D]."""
        ends = counts.cumsum(0).to(torch.int32)
        gate, up = grouped_linear(rows, self.gate_up, ends).chunk(2, -1)
        return grouped_linear(swiglu(gate, up), self.down, ends)


@dataclass
class PendingMoE:
    """A mixture of experts between its three calls."""

    u: Tensor  # [T, D]
    gates: Tensor  # [T, K]
    plan: Permutation
    handle: Any
    statistics: RoutingStatistics


class MoE(nn.Module):
    """Σ over the chosen experts of gate · expert(u), as dispatch, experts, combine."""

    def __init__(self, config: ModelConfig, balance_groups: int) -> None:
        super().__init__()
        self.config = config
        self.balance_groups = balance_groups
        self.router = Router(config)
        self.experts = Experts(config)
        self.exchange: Exchange = LocalExchange()

    def dispatch(self, u: Tensor) -> PendingMoE:
        """Route u [T, D] and start sending the rows of FFN experts; identity experts' tokens stay."""
        probabilities, indices, gates = self.router(u)
        plan = plan_permutation(indices, self.config.num_experts, self.config.num_routed)
        balance, slope = balance_loss(probabilities, plan.counts, self.config, self.balance_groups)
        statistics = RoutingStatistics(balance, slope, plan.counts, plan.is_ffn.sum(1))
        handle = self.exchange.start(permute(u, plan), plan.counts[: self.config.num_experts])
        return PendingMoE(u, gates, plan, handle, statistics)

    def compute(self, pending: PendingMoE) -> PendingMoE:
        """Wait for the rows, run the experts on them and start the way back."""
        rows, counts = self.exchange.wait(pending.handle)
        pending.handle = self.exchange.start_back(self.experts(rows, counts), pending.handle)
        return pending

    def combine(self, pending: PendingMoE) -> Tensor:
        """Wait for the results and sum them with the identity experts' share → [T, D]."""
        rows = self.exchange.wait_back(pending.handle)
        return combine(rows, pending.gates, pending.u, pending.plan)


def balance_loss(probabilities: Tensor, counts: Tensor, config: ModelConfig, num_groups: int) -> tuple[Tensor, Tensor]:
    """Device-level balance loss Σ_j f_j P_j (section 5) and f of each expert's group [N + Z].

    Counts are selections; T is this micro-batch. With no identity experts, or none expected, their group is absent.
    """
    num_tokens = probabilities.shape[0]
    num_experts, expected = config.num_experts, config.expected_ffn_experts
    size = num_experts // num_groups
    by_group = counts[:num_experts].view(num_groups, size).sum(1).float()
    slope = (by_group * (num_groups / (expected * num_tokens))).repeat_interleave(size)
    identity = torch.zeros(config.num_zero_experts, device=slope.device)
    if config.top_k > expected:
        share = counts[num_experts:].sum().float() / ((config.top_k - expected) * num_tokens)
        identity = identity + share
    slope = torch.cat((slope, identity))
    return (probabilities.mean(0) * slope).sum(), slope
