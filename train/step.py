"""One training step: micro-batches, gradients, norm, AdamW, bias control, metrics."""

# L layers, N FFN experts, Z identity experts

from __future__ import annotations

import math
import time
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor

from longcat.counts import flops_per_token
from longcat.documents import to_device
from longcat.model import Losses
from longcat.moe import round_to
from longcat.ops.calls import unobserved
from parallel.elastic import sum_exactly
from parallel.mesh import Axis, Topology
from parallel.reduce import PendingSum, own_row, sum_in_one_collective
from parallel.sdc.replay import Traced, traced
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import begin_step, work_span
from train.balance import BiasController
from train.batches import Batch, BatchReader
from train.config import Config
from train.data.config import Packing
from train.health import figures
from train.health.events import Spike
from train.health.monitor import HealthMonitor
from train.objective import Divisors, objective
from train.optimizer import set_rates
from train.rank_usage import RankUsage, UsageMeter
from train.schedule import rate_factor
from train.sdc.guard import Guard
from train.stages.configs import segments_of
from train.state import TrainState


@dataclass
class StepSums:
    """Sums over this rank's micro-batches, on its device. The sum over all ranks counts each micro-batch once."""

    sums: Tensor  # [5] float64: lm, mtp, balance, hidden z, hidden norm
    counts: Tensor  # [L, N + Z] int64
    balance_grad: Tensor  # [L, N + Z] Σ ∂(balance loss)/∂P by the mean router probabilities P, without its weight


@dataclass(frozen=True)
class StepRequests:
    """What a rank requests after a step; the step's all-reduce carries it, so that all ranks do the same."""

    stop: bool = False  # save and stop
    save: bool = False  # save, since checkpoint.every_minutes have passed
    wait_pending: bool = False  # check how the asynchronous save ended


@dataclass(frozen=True)
class StepTotals:
    """A step's sums over all ranks, the same on every rank; the update does not wait for the last ones."""

    sums: list[float]  # [5] as in `StepSums`
    grad_norm: float  # before clipping
    counts: Tensor  # [L, N + Z] int64
    margins: Tensor  # [L, N + Z, bins] int64 histograms for the bias controller
    requests: StepRequests
    statistics: PendingSum  # `_probability_grads`, `_directions`, squared gradient norms by part, usage by rank


NONE = StepRequests()
# With train.elastic_bits these sums are added in multiples of a unit, so that their order does not matter
PROBABILITY_GRAD_UNIT = 2.0**-44  # of the gradients of routers' probabilities: exact below 512
BALANCE_GRAD_UNIT = 2.0**-32  # of the balance loss's, at most the number of groups a micro-batch: exact below 2^21
NOT_FINITE_BIASES = "a selection bias or the bias controller's state is not finite"


@dataclass
class StepResult:
    """Results of one step, the same on every rank."""

    metrics: dict[str, Any]  # keys of metrics.jsonl
    num_tokens: int  # of text, in the global batch
    counts: Tensor  # [L, N+Z] int64, selections of the global batch
    grad_norms: dict[str, float | None]  # gradient norms before clipping of each part of the model, as metrics
    problem: str  # what is not finite; then no weight was updated. Empty if all is well
    requests: StepRequests  # set where any rank requested it
    by_layer: dict[str, Any]  # other figures of each layer, as metrics
    usage: RankUsage
    spike: Spike | None = None  # its action says whether the step was applied

    @property
    def healthy(self) -> bool:
        return not self.problem


class Stepper:
    """Runs steps on a state. When to save, log or stop is the loop's decision."""

    def __init__(self, state: TrainState, reader: BatchReader, config: Config, topology: Topology) -> None:
        self.state, self.reader, self.config, self.topology = state, reader, config, topology
        self.elastic = config.train.elastic_bits > 0
        self.meter = UsageMeter(topology.device)
        self.guard = Guard(state, config.sdc, topology, config.run.folder / "sdc", repeats=config.train.deterministic)
        self.guard.replay = self._replay
        self.stage_starts = [segment.start for segment in segments_of(config)[1:]]
        reader.left_out = state.health.skipped
        self.monitor = HealthMonitor(config.health, state.health, config.model.num_experts, config.optim.eps)
        if config.sdc.every and config.train.deterministic and state.store.has_replicas:  # not under DeepSpeed
            self.monitor.before_action = self._check_spike

    def step(self, requests: StepRequests = NONE) -> StepResult:
        """Train on the next global batch.

        No weight is updated if the loss, a gradient or a new bias is not finite, or if the step is a spike that
        `health.on_spike` leaves out. The counters advance in any case, so data and schedule continue after such a step.

        Raises:
            CorruptionError: on every rank, if a check found silent data corruption; nothing was updated.
        """
        counters, config = self.state.counters, self.config
        begin_step(counters.step + 1)
        self.meter.begin_step()
        self.guard.begin_step(counters.step + 1)
        batches = list(self.reader.read(counters.position))
        divisors = self.reader.divisors(batches)
        use_mtp = self._uses_mtp()
        self._inputs = batches, divisors, use_mtp
        local = self._backward(*self._inputs) if not self.guard.replays else self._backward_with_replay()
        totals = self._reduce(local, requests)
        factor = rate_factor(config.schedule, counters.step + 1)
        spike, problem = self._judge_and_update(totals, totals.sums[0] / max(divisors.valid_tokens, 1), factor)
        statistics = totals.statistics.wait()
        self.guard.end_step()
        counters.step += 1
        counters.samples += config.train.global_batch_size
        counters.tokens += divisors.tokens + divisors.padding
        result = self._result(totals, statistics, divisors, factor, use_mtp, spike, problem)
        self.meter.end_step()
        return result

    def _reduce(self, local: StepSums, requests: StepRequests) -> StepTotals:
        """Sum over ranks what the update depends on, in one collective, and start summing the statistics.

        Raises:
            CorruptionError: on every rank, if a check found silent data corruption.
        """
        device = self.topology.device
        with work_span(Event(SpanKind.GRADIENT_NORM)):
            squares = to_device(self.state.store.gradient_squares(), device)
            self._first_sums = local.sums, squares
            wanted = torch.tensor([float(request) for request in astuple(requests)], dtype=torch.float64)
            numbers = torch.cat((squares[:1], to_device(local.sums, device), to_device(wanted, device)))
            # Integers below 2^53, and zeros but for one rank's: they are exact in float64
            scalars, counts, margins, checks = sum_in_one_collective(
                numbers, local.counts, self._margins(), self.guard.numbers()
            )
            self.guard.judge(checks)
            usage = own_row(to_device(self.meter.take(), device))
            statistics = PendingSum(self._probability_grads(local), self._directions(), squares[1:], usage)
        square, *sums = scalars[: -wanted.numel()].tolist()
        requested = StepRequests(*(count > 0 for count in scalars[-wanted.numel() :].tolist()))
        return StepTotals(sums, math.sqrt(square), counts.long(), margins.long(), requested, statistics)

    def _judge_and_update(self, totals: StepTotals, loss: float, factor: float) -> tuple[Spike | None, str]:
        """Update weights and biases, unless something is not finite or the step is a spike that is left out.

        Returns the spike, if the step is one, and what is not finite.
        """
        state, counters, norm = self.state, self.state.counters, totals.grad_norm
        if self._starts_mtp() or self._starts_stage():
            state.health.forget()
        spike = self.monitor.judge(counters.step + 1, counters.position, loss, norm)
        if spike is not None and not spike.updates:
            state.store.drop_gradients()
            return spike, ""
        if not all(map(math.isfinite, (norm, *totals.sums))):
            return spike, f"loss {loss}, gradient norm {norm}"
        biases = state.controller.update(totals.counts, totals.margins)
        if not is_finite(biases, state.controller):
            return spike, NOT_FINITE_BIASES
        with work_span(Event(SpanKind.OPTIMIZER)):
            self._update(norm, factor, biases)
        return spike, ""

    def _result(
        self,
        totals: StepTotals,
        statistics: list[Tensor],
        divisors: Divisors,
        factor: float,
        use_mtp: bool,
        spike: Spike | None,
        problem: str,
    ) -> StepResult:
        """The step's metrics, after the counters have advanced. ``statistics`` are the sums of `StepTotals`'."""
        config, model, counts = self.config, self.config.model, totals.counts
        grads, directions, part_squares, usage = statistics
        if self.elastic:
            grads[1] = self._weigh_balance(grads[1])
        similarities = figures.similarities_by_layer(directions, model.num_routed)
        metrics = self._metrics(totals, divisors, factor, grads, use_mtp)
        metrics["router_similarity"] = max(similarities)
        if config.data.packing == Packing.best_fit:
            metrics["padding_share"] = divisors.padding / (divisors.tokens + divisors.padding)
        if self.guard.replays:
            metrics["replay_seconds"] = self._replay_seconds
        rms = figures.gradient_rms(part_squares, totals.grad_norm, model, config.optim.grad_clip, use_mtp)
        metrics |= self.monitor.observe(self.state.counters.step, counts, metrics["hidden_norm"], rms)
        if spike is not None:
            metrics["spike_action"] = str(spike.action)
        by_layer = figures.named("router_similarity", similarities)
        by_layer |= figures.named("router_grad_ratio", figures.ratios_by_layer(grads))
        by_layer |= figures.named("expert_load_max_over_mean", figures.loads_by_layer(counts, model))
        by_layer |= {f"grad_rms/{part}": value for part, value in rms.items()}
        norms, of_ranks = figures.norms_by_part(part_squares, use_mtp), RankUsage.of(usage)
        return StepResult(metrics, divisors.tokens, counts, norms, problem, totals.requests, by_layer, of_ranks, spike)

    def _backward(self, batches: list[Batch], divisors: Divisors, use_mtp: bool) -> StepSums:
        self._reset_routers()
        weights = self.config.loss, self.config.balance.group_loss_weight
        losses_by_part = self.state.engine.run(batches, lambda losses: objective(losses, divisors, *weights), use_mtp)
        return self._sum(losses_by_part)

    def _backward_with_replay(self) -> StepSums:
        """Forward and backward of the neighbouring group's micro-batches, then of this rank's, both traced."""
        start = time.perf_counter()
        theirs = self._replay(1)
        self._replay_seconds = time.perf_counter() - start
        with traced() as own:
            local = self._backward(*self._inputs)
        self.guard.compare_with_neighbours(own, theirs)
        return local

    def _replay(self, groups: int) -> Traced:
        """A trace of the forward and backward of the rank ``groups`` expert groups further; leaves no gradients."""
        _, divisors, use_mtp = self._inputs
        data_rank = self.guard.neighbours.data_rank(self.topology.data_rank, groups)
        batches = list(self.reader.read(self.state.counters.position, data_rank))
        self.state.store.drop_gradients()
        with unobserved(), traced() as found:
            self._backward(batches, divisors, use_mtp)
        self.state.store.drop_gradients()
        return found

    def _run_again(self, batches: list[Batch], divisors: Divisors, use_mtp: bool) -> tuple[Tensor, Tensor]:
        """Forward and backward of the same batches: the gradients anew, this rank's losses and shares of norms."""
        self.state.store.drop_gradients()
        local = self._backward(batches, divisors, use_mtp)
        return local.sums, self.state.store.gradient_squares()

    def _check_spike(self, _: Spike) -> None:
        """Before a spike's action: the step is replayed and repeated, so that no wrong computation passes for a spike.

        Raises:
            CorruptionError: on every rank, if a neighbour computes something else, or a rank's sums have other bits.
        """
        if self.guard.replay_every:
            theirs = self._replay(1)
            self.guard.judge_replay(self._replay(0), theirs)
        (losses, squares), (losses_again, squares_again) = self._first_sums, self._run_again(*self._inputs)
        self.guard.judge_repetition(losses.cpu(), losses_again.cpu(), own_sums=not self.elastic)
        self.guard.judge_repetition(
            squares.cpu(), squares_again.cpu(), own_sums=False
        )  # of gradients that are summed over ranks

    def use(self, config: Config, reader: BatchReader) -> None:
        """Go on with the configuration of another stage, and a reader of its batches."""
        self.config, self.reader = config, reader
        reader.left_out = self.state.health.skipped

    def _uses_mtp(self) -> bool:
        return self.config.trains_mtp and self.state.counters.tokens >= self.config.loss.mtp_start_tokens

    def _starts_mtp(self) -> bool:
        """Whether this step is the first with MTP by `loss.mtp_start_tokens`: its gradient adds to the norm."""
        train, counters = self.config.train, self.state.counters
        before = counters.tokens - train.global_batch_size * train.sequence_length
        return self._uses_mtp() and before < self.config.loss.mtp_start_tokens

    def _starts_stage(self) -> bool:
        """Whether a stage of `data.stages` begins in this step's batch: its loss may be another."""
        train, place, position = self.config.train, self.state.health.skipped.place, self.state.counters.position
        before = place(position - 1) if position else -1  # a range that is left out may hold the start
        last = place(position + train.global_batch_size - 1)
        return any(before < start <= last for start in self.stage_starts)

    def _sum(self, losses_by_part: list[list[Losses]]) -> StepSums:
        """Add up what each part of the model returned per micro-batch, with weight 0 for what other ranks count.

        TP ranks share the vocabulary and so compute the same `lm` and `mtp`; TP and CP ranks share a micro-batch and
        so compute the same balance gradient.
        """
        counts_labels = float(self.topology.coordinate(Axis.TP) == 0)
        counts_balance = counts_labels * float(self.topology.coordinate(Axis.CP) == 0)
        shape, device = self.state.biases.shape, self.topology.device
        float_type = torch.float64 if self.elastic else torch.float32
        total = StepSums(
            torch.zeros(5, dtype=torch.float64, device=device),
            torch.zeros(shape, dtype=torch.int64, device=device),
            torch.zeros(shape, dtype=float_type, device=device),
        )
        weights = to_device(torch.tensor([counts_labels] * 2 + [1.0] * 3, dtype=torch.float64), device)
        by_micro_batch = []
        for model, losses in zip(self.state.models, losses_by_part, strict=True):
            layers = slice(model.part.first, model.part.last)
            rows = [(one.lm, one.mtp, one.balance, one.hidden_z, one.hidden_norm) for one in losses]
            by_micro_batch.append(torch.stack([torch.stack([x.double() for x in row]) for row in rows]))
            total.sums += by_micro_batch[-1].sum(0) * weights
            total.counts[layers] += torch.stack([one.counts for one in losses]).sum(0)
            grads = torch.stack([one.balance_grad for one in losses])
            grads = round_to(grads, BALANCE_GRAD_UNIT) if self.elastic else grads
            total.balance_grad[layers] += grads.sum(0)
        total.balance_grad *= counts_balance
        if self.elastic:
            total.sums = sum_exactly((torch.cat(by_micro_batch) * weights).cpu())
        return total

    def _update(self, norm: float, factor: float, biases: Tensor) -> None:
        limit = self.config.optim.grad_clip
        if limit and norm > limit:
            self.state.store.scale_gradients(limit / norm)
        set_rates(self.state.store.optimizer, self.config.optim, factor)
        self.state.store.step()
        self.state.set_biases(biases)

    def _reset_routers(self) -> None:
        """Let the routers accumulate Σ_t ∂loss/∂R_t in this step's backward."""
        for _, router in self.state.routers():
            float_type = torch.float64 if self.elastic else torch.float32
            router.probability_grad = torch.zeros_like(router.e_score_correction_bias, dtype=float_type)
            router.grad_unit, router.direction = PROBABILITY_GRAD_UNIT if self.elastic else 0.0, None
            if bins := self.state.controller.margin_bins:
                bias = router.e_score_correction_bias
                router.margins = torch.zeros(len(bias), bins, dtype=torch.int64, device=bias.device)

    def _margins(self) -> Tensor:
        """This rank's part of the histograms that the bias controller needs: [L, N+Z, bins] int64."""
        shape = (*self.state.biases.shape, self.state.controller.margin_bins)
        margins = torch.zeros(shape, dtype=torch.int64, device=self.topology.device)
        for number, router in self.state.routers():
            if router.margins is not None:
                margins[number] = router.margins
        return margins

    def _directions(self) -> Tensor:
        """This rank's part of the sums of each router's rows, scaled to length 1: [L, D]; each router counts once."""
        model = self.config.model
        sums = torch.zeros(model.num_layers, model.hidden_size, dtype=torch.float64, device=self.topology.device)
        for number, router in self.state.routers():
            assert router.direction is not None
            sums[number] = router.direction * float(self.topology.holds_first_shards)
        return sums

    def _probability_grads(self, local: StepSums) -> Tensor:
        """This rank's part of ∇_P of the task's loss and of the balance loss: [2, L, N+Z].

        With train.elastic_bits the second is divided after it is summed: quotients would not add exactly.
        """
        task = torch.zeros_like(local.balance_grad)
        for number, router in self.state.routers():
            assert router.probability_grad is not None
            task[number] = router.probability_grad
        balance = local.balance_grad if self.elastic else self._weigh_balance(local.balance_grad)
        return torch.stack((task, balance))

    def _weigh_balance(self, grad: Tensor) -> Tensor:
        """Σ of the balance loss's gradients → that of its term in the step's loss, a weighted mean."""
        return grad / self.reader.num_micro_batches * self.config.balance.group_loss_weight

    def _metrics(
        self, totals: StepTotals, divisors: Divisors, factor: float, grads: Tensor, use_mtp: bool
    ) -> dict[str, Any]:
        config, counters, sums, counts = self.config, self.state.counters, totals.sums, totals.counts
        used = float(counts[:, : config.model.num_experts].sum()) / (config.model.num_layers * divisors.tokens)
        keys = divisors.attended / divisors.tokens
        per_token = flops_per_token(config.model, config.train.sequence_length, used, mtp=use_mtp, keys=keys)
        return {
            "step": counters.step,
            "first_sample": self.state.health.skipped.place(counters.position - config.train.global_batch_size),
            "tokens": counters.tokens,
            "loss": sums[0] / max(divisors.valid_tokens, 1),
            "loss_mtp": sums[1] / max(divisors.mtp_tokens, 1) if use_mtp else None,
            "loss_balance": config.balance.group_loss_weight * sums[2] / divisors.micro_batches,
            "loss_z": config.loss.hidden_z_weight * sums[3] / divisors.tokens,
            "grad_norm": totals.grad_norm,
            "lr": config.optim.lr * factor,
            "ffn_experts_per_token": used,
            "expert_load_max_over_mean": max(figures.loads_by_layer(counts, config.model)),
            "router_grad_ratio": max(figures.ratios_by_layer(grads)),
            "hidden_norm": sums[4] / divisors.tokens,
            "flops": divisors.tokens * per_token,
        }


def is_finite(biases: Tensor, controller: BiasController) -> bool:
    """Whether the next selection biases and the controller's state are finite."""
    return all(bool(torch.isfinite(values).all()) for values in (biases, *controller.state().values()))
