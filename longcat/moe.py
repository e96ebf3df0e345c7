"""The mixture of experts: router, zero-computation experts, stacked SwiGLU experts.

A layer makes four calls and overlaps them with its dense path: `dispatch` starts sending tokens; `send_rows` sends them
if the host had to wait for the numbers of rows (on a GPU); `compute` waits for the rows, runs the experts and starts
combine; `combine` waits for the results. In one process nothing is sent.
"""

# T local tokens, K selections per token, N FFN experts, Z identity experts, E local FFN experts, P rows for them,
# D width, F expert width

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longcat.config import ModelConfig
from longcat.dispatch import LocalDispatcher, Routing
from longcat.documents import Documents
from longcat.interfaces import DispatcherModule, SequenceModule, WeightGradModule, local_tensor
from longcat.modules import Linear, grad_store
from longcat.ops.fp32_linear import fp32_linear
from longcat.ops.grouped import grouped_gated_linear, grouped_linear
from longcat.ops.recomputed import recomputable
from longcat.ops.selections import count_margins, count_selections, selected_gates
from longcat.recompute_values import Value


class RoutingStatistics(NamedTuple):
    """One layer's statistics of one micro-batch; returned, not stored, so that a recomputed layer counts once."""

    balance: Tensor  # scalar, the local tokens' part of Σ_j f_j P_j, the balance loss without its weight α
    balance_grad: Tensor  # [N + Z], its derivative by the mean probability P of each expert: f of its group
    counts: Tensor  # [N + Z] int64, selections of each expert by local tokens
    ffn_experts: Tensor  # [T] int64, number of FFN experts of each token


class Router(nn.Module):
    """Softmax over N+Z in float32; the bias affects the selection, never the gates (section 3 of the equations)."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.classifier = Linear(config.hidden_size, config.num_routed)
        self.register_buffer("e_score_correction_bias", torch.empty(config.num_routed))
        # Accumulators of a step, which the trainer sets before its first micro-batch
        self.probability_grad: Tensor | None = None  # if set to zeros [N + Z], the backward adds Σ_t ∂loss/∂R_t
        self.grad_unit = 0.0  # if set, each backward's sum is rounded to multiples of it, which add in any order
        self.direction: Tensor | None = None  # [D] float64, Σ of the classifier's normalised rows in this step
        self.margins: Tensor | None = None  # if set to zeros [N + Z, bins], the backward adds `count_margins`

    def forward(self, u: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """u [T, D] → probabilities R [T, N+Z], selected experts [T, K], gates γ·R [T, K]; floats in float32.

        Where ``padding`` [T] is True, all K selections are the number N+Z, with gates of 0: an identity expert that
        only padding uses, so that the model needs none and no count of an expert includes padding.
        """
        weight = local_tensor(self.classifier.weight).float()
        if self.probability_grad is not None and self.direction is None:
            self.direction = torch.nn.functional.normalize(weight.detach().double(), dim=1).sum(0)
        logits = fp32_linear(u, weight)
        probabilities = torch.softmax(logits, -1)
        with torch.no_grad():
            scores = probabilities + self.e_score_correction_bias
            indices = torch.topk(scores, self.config.top_k, -1, sorted=False).indices
        gating = probabilities
        if self.probability_grad is not None and probabilities.requires_grad:
            gating = probabilities.view_as(probabilities)
            gating.register_hook(self._add_to_probability_grad)
            if self.margins is not None:
                gating.register_hook(partial(self._add_to_margins, probabilities.detach(), padding))
        gates = selected_gates(gating, indices) * self.config.routed_scaling_factor
        if padding is not None:
            rows = padding[:, None]
            indices, gates = indices.masked_fill(rows, self.config.num_routed), gates.masked_fill(rows, 0.0)
        return probabilities, indices, gates

    def _add_to_probability_grad(self, grad: Tensor) -> None:
        if self.probability_grad is not None:
            total = grad.sum(0)
            self.probability_grad += round_to(total, self.grad_unit) if self.grad_unit else total

    def _add_to_margins(self, probabilities: Tensor, padding: Tensor | None, _: Tensor) -> None:
        """In the backward, as a recomputed forward runs twice."""
        if self.margins is not None:
            bias, bins = self.e_score_correction_bias, self.margins.shape[1]
            self.margins += count_margins(probabilities, bias, self.config.top_k, bins, padding)


def round_to(values: Tensor, unit: float) -> Tensor:
    """Float64 multiples of ``unit``, a power of two; sums of them below 2^53 units are exact."""
    return (values.double() / unit).round() * unit


class Experts(WeightGradModule):
    """Stacked SwiGLU experts: gate_up [N, 2F, D], down [N, D, F]; under expert parallelism each rank has E of the N."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        num, width, hidden = config.num_experts, config.hidden_size, config.expert_hidden_size
        self.gate_up = nn.Parameter(torch.empty(num, 2 * hidden, width))
        self.down = nn.Parameter(torch.empty(num, width, hidden))

    def forward(self, rows: Tensor, counts: Tensor, log_gates: Tensor | None = None) -> Tensor:
        """rows [P, D] sorted by expert, counts [E] → [P, D]; ``log_gates`` [P] as `Dispatcher.wait_dispatch` gives."""
        ends = counts.cumsum(0).to(torch.int32)
        gate_up = recomputable(Value.expert_hidden, self.project, rows, ends)
        return grouped_gated_linear(gate_up, local_tensor(self.down), ends, grad_store(self, "down"), log_gates)

    def project(self, rows: Tensor, ends: Tensor) -> Tensor:
        """rows [P, D], ``ends`` [E] the row after each expert's last → gate and up [P, 2F]."""
        return grouped_linear(rows, local_tensor(self.gate_up), ends, grad_store(self, "gate_up"))


@dataclass
class PendingMoE:
    """The state of a mixture of experts between its calls."""

    chunks: list[Any]  # the dispatcher's state of each chunk of tokens
    probabilities: Tensor  # [T, N + Z]
    indices: Tensor  # [T, K]
    counts: Tensor  # [N + Z]
    total: Any  # handle of the counts' sum over the micro-batch
    padding: Tensor | None  # [T] bool, True at padding; None where samples are never padded
    num_tokens: int | Tensor  # of the micro-batch, on all ranks that share it, without padding


class MoE(SequenceModule, DispatcherModule):
    """Σ over the selected experts of gate · expert(u), as dispatch, experts, combine."""

    def __init__(self, config: ModelConfig, balance_groups: int) -> None:
        super().__init__()
        self.config = config
        self.balance_groups = balance_groups
        self.router = Router(config)
        self.experts = Experts(config)
        self.num_chunks = 1  # of the tokens: communication and experts of different chunks overlap
        self.after_attention = False  # run the experts after attention 1 instead of after the first FFN
        # A context around the experts that selects their stream
        self.expert_stream: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.dispatcher = LocalDispatcher()

    def dispatch(self, u: Tensor, documents: Documents | None = None) -> PendingMoE:
        """Route u [T, D] and start sending tokens to their FFN experts; identity experts are local."""
        num_experts, num_routed = self.config.num_experts, self.config.num_routed
        sizes, padding = (num_experts, num_routed), None
        num_tokens: int | Tensor = u.shape[0] * self.sequence.num_shards
        if documents is not None and documents.padding is not None:
            sizes, num_tokens = (num_experts, num_routed + 1), documents.padding.num_tokens
            padding = documents.padding.local(self.sequence).flatten()
        probabilities, indices, gates = self.router(u, padding)
        parts = zip(*(tensor.tensor_split(self.num_chunks) for tensor in (u, indices, gates)), strict=True)
        chunks = self.dispatcher.start_dispatch([(x, Routing(index, gate, *sizes)) for x, index, gate in parts])
        counts = count_selections(indices, sizes[1])[:num_routed]
        total = self.sequence.start_count(counts)
        return PendingMoE(chunks, probabilities, indices, counts, total, padding, num_tokens)

    def send_rows(self, pending: PendingMoE) -> None:
        """Send the rows if `dispatch` did not. Queue work before, which overlaps the host's wait for their number."""
        for chunk in pending.chunks:
            self.dispatcher.send_rows(chunk)

    def compute(self, pending: PendingMoE) -> PendingMoE:
        """Wait for the rows, run the experts on them and start combine."""
        with self.expert_stream():
            for number, chunk in enumerate(pending.chunks):
                arrived = self.dispatcher.wait_dispatch(chunk)
                pending.chunks[number] = self.dispatcher.start_combine(self.experts(*arrived), chunk)
        return pending

    def combine(self, pending: PendingMoE) -> tuple[Tensor, RoutingStatistics]:
        """Wait for the results → [T, D], and the router's statistics."""
        parts = [self.dispatcher.wait_combine(chunk) for chunk in pending.chunks]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        total = self.sequence.wait_count(pending.total)
        num_tokens, probabilities = pending.num_tokens, pending.probabilities
        if pending.padding is not None:
            probabilities = probabilities.masked_fill(pending.padding[:, None], 0.0)
        loads = group_loads(total, num_tokens, self.config, self.balance_groups)
        balance = (probabilities.sum(0) / num_tokens * loads).sum()
        ffn_experts = (pending.indices < self.config.num_experts).sum(1)
        return out, RoutingStatistics(balance, loads, pending.counts, ffn_experts)


def group_loads(counts: Tensor, num_tokens: int | Tensor, config: ModelConfig, num_groups: int) -> Tensor:
    """f of each expert's group [N + Z] in the device-level balance loss Σ_j f_j P_j (section 5).

    ``counts`` [N + Z] are the selections of the micro-batch's ``num_tokens``. Without identity experts, or with none
    expected, their group has f = 0.
    """
    num_experts, expected = config.num_experts, config.expected_ffn_experts
    size = num_experts // num_groups
    by_group = counts[:num_experts].view(num_groups, size).sum(1).float()
    ffn = (by_group * (num_groups / (expected * num_tokens))).repeat_interleave(size)
    identity = torch.zeros(config.num_zero_experts, device=ffn.device)
    if config.top_k > expected:
        share = counts[num_experts:].sum().float() / ((config.top_k - expected) * num_tokens)
        identity = identity + share
    return torch.cat((ffn, identity))
