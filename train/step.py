"""One training step: micro-batches, gradients, norm, AdamW, bias control, and the numbers of it all."""

# L layers, N FFN experts, Z identity experts

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longcat.counts import flops_per_token
from longcat.model import Losses
from parallel.crumbs import begin_step, phase
from parallel.mesh import Topology
from parallel.reduce import gradient_square, scale_gradients, sum_over_ranks, sum_together
from parallel.sharding import local_part, set_gradient_sync
from train.batches import Batch, BatchReader
from train.config import Config
from train.objective import Divisors, objective
from train.optimizer import set_rates
from train.schedule import rate_factor
from train.state import TrainState, set_biases


@dataclass
class Tally:
    """What this rank's micro-batches add up to."""

    sums: list[Tensor] = field(default_factory=list)  # [5] lm, mtp, balance, hidden z, hidden norm; on the device
    counts: list[Tensor] = field(default_factory=list)
    balance_slope: list[Tensor] = field(default_factory=list)

    def add(self, losses: Losses) -> None:
        parts = (losses.lm, losses.mtp, losses.balance, losses.hidden_z, losses.hidden_norm)
        self.sums.append(torch.stack([part.detach().double() for part in parts]))
        self.counts.append(losses.counts)
        self.balance_slope.append(losses.balance_slope)


@dataclass
class StepResult:
    """Global figures of one step; the same on every rank."""

    metrics: dict[str, Any]  # keys of metrics.jsonl, and `flops` of the step
    counts: Tensor  # [L, N+Z] int64, selections of the global batch
    healthy: bool  # False: nothing was updated
    stop: bool  # some rank was asked to stop


class Stepper:
    """Runs steps on a state. Knows nothing of when to save, log or stop."""

    def __init__(self, state: TrainState, reader: BatchReader, config: Config, topology: Topology) -> None:
        self.state, self.reader, self.config, self.topology = state, reader, config, topology
        self.parameters = [parameter for _, parameter in state.parameters]

    def step(self, stop_requested: bool) -> StepResult:
        """Train on the next global batch. With a loss or gradient that is not finite, nothing is updated."""
        counters, config = self.state.counters, self.config
        begin_step(counters.step + 1)
        batches = list(self.reader.read(counters.samples))
        divisors = self.reader.divisors(batches)
        use_mtp = counters.tokens >= config.loss.mtp_start_tokens and config.model.num_mtp_layers > 0
        self._watch_gates()
        tally = self._backward(batches, divisors, use_mtp)

        with phase("norm and numbers"):
            square, sums, slopes, directions = sum_together(
                gradient_square(self.parameters, self.topology),
                torch.cat((torch.stack(tally.sums).sum(0).cpu(), torch.tensor([float(stop_requested)]))),
                self._slopes(tally),
                router_directions(self.state, self.topology),
            )
            counts = sum_over_ranks(torch.stack(tally.counts).sum(0).cpu())
        norm = math.sqrt(square)
        healthy = math.isfinite(norm) and bool(torch.isfinite(sums).all())
        factor = rate_factor(config.schedule, counters.step + 1)
        if healthy:
            with phase("optimizer"):
                self._update(norm, factor, counts)
        counters.step += 1
        counters.samples += config.train.global_batch_size
        counters.tokens += divisors.tokens
        metrics = self._metrics(sums.tolist(), divisors, norm, factor, counts, slopes, use_mtp)
        metrics["router_similarity"] = router_similarity(directions, config.model.num_routed)
        return StepResult(metrics, counts, healthy, stop=bool(sums[5] > 0))

    def _backward(self, batches: list[Batch], divisors: Divisors, use_mtp: bool) -> Tally:
        tally = Tally()
        for number, batch in enumerate(batches, start=1):
            set_gradient_sync(self.state.model, last=number == len(batches), mtp=use_mtp)
            with phase(f"forward of micro-batch {number}"):
                losses: Losses = self.state.model(batch.tokens, batch.labels, batch.valid, batch.documents, mtp=use_mtp)
            with phase(f"backward of micro-batch {number}"):
                objective(losses, divisors, self.config.loss, self.config.balance.group_loss_weight).backward()
            tally.add(losses)
        return tally

    def _update(self, norm: float, factor: float, counts: Tensor) -> None:
        limit = self.config.optim.grad_clip
        if limit and norm > limit:
            scale_gradients(self.parameters, limit / norm)
        set_rates(self.state.optimizer, self.config.optim, factor)
        self.state.optimizer.step()
        self.state.optimizer.zero_grad(set_to_none=True)
        set_biases(self.state.model, self.state.controller.update(counts))

    def _watch_gates(self) -> None:
        """Let the routers gather Σ_t ∂loss/∂R_t of this step's backward."""
        for router in self.state.model.routers():
            router.gate_slope = torch.zeros_like(router.e_score_correction_bias)

    def _slopes(self, tally: Tally) -> Tensor:
        """This rank's share of ∇_P of the task's loss and of the balance loss: [2, L, N+Z]."""
        slopes = [router.gate_slope for router in self.state.model.routers()]
        gates = torch.stack([slope for slope in slopes if slope is not None])
        balance = torch.stack(tally.balance_slope).sum(0) / self.reader.num_micro_batches
        balance = balance * self.config.balance.group_loss_weight
        return torch.stack((gates, balance))

    def _metrics(
        self,
        sums: list[float],
        divisors: Divisors,
        norm: float,
        factor: float,
        counts: Tensor,
        slopes: Tensor,
        use_mtp: bool,
    ) -> dict[str, Any]:
        config, counters = self.config, self.state.counters
        num_experts = config.model.num_experts
        ffn = counts[:, :num_experts].double()
        used = float(ffn.sum()) / (config.model.num_layers * divisors.tokens)
        task, balance = torch.linalg.vector_norm(slopes, dim=-1)
        return {
            "step": counters.step,
            "tokens": counters.tokens,
            "loss": sums[0] / max(divisors.valid_tokens, 1),
            "loss_mtp": sums[1] / max(divisors.mtp_tokens, 1) if use_mtp else None,
            "loss_balance": config.balance.group_loss_weight * sums[2] / divisors.micro_batches,
            "loss_z": config.loss.hidden_z_weight * sums[3] / divisors.tokens,
            "grad_norm": norm,
            "lr": config.optim.lr * factor,
            "ffn_experts_per_token": used,
            "expert_load_max_over_mean": float((ffn.amax(1) / ffn.mean(1).clamp_min(1e-9)).max()),
            "router_grad_ratio": float((balance / task.clamp_min(1e-300)).max()),
            "hidden_norm": sums[4] / divisors.tokens,
            "flops": divisors.tokens * flops_per_token(config.model, config.train.sequence_length, used, mtp=use_mtp),
        }


def router_directions(state: TrainState, topology: Topology) -> Tensor:
    """This rank's share of the sum of each router's rows, scaled to length 1: [L, D]; replicas count once."""
    shares = []
    for router in state.model.routers():
        rows = local_part(router.classifier.weight.detach())[0].double()
        shares.append(torch.nn.functional.normalize(rows, dim=1).sum(0))
    return torch.stack(shares) * float(topology.holds_first_replica)


def router_similarity(directions: Tensor, num_rows: int) -> float:
    """Mean pairwise cosine of a router's rows, the largest over the layers (section 9), from their sums [L, D]."""
    pairs = directions.square().sum(1) - num_rows
    return float(pairs.max()) / max(num_rows * (num_rows - 1), 1)
