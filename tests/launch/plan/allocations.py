"""Peaks of one rank's step: of a real rank, from its allocator's events, and as the planner traces it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import longcat.ops.grouped
from launch.plan.trace import Scope, Traced, trace
from parallel.mesh import Topology, connect
from train.batches import Batch
from train.check import batch_shape
from train.compose import compose
from train.config import Config
from train.objective import Divisors, objective
from train.run import build_state
from train.state import TrainState

COMMON = [
    "model=debug",
    "train.dtype=bfloat16",
    "train.sequence_length=128",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
]


@dataclass(frozen=True)
class Measured:
    """What one rank's allocator and routers did in a step."""

    peak: int  # bytes
    state: int  # bytes when the model is built
    selections: Tensor  # [micro-batches, layers, N] FFN selections of its own tokens, by expert
    tokens: int  # of a micro-batch, on this rank


def measure(overrides: Sequence[str]) -> Measured:
    """Allocator bytes of this rank at their peak, from an empty process to the end of a step's update."""
    config = compose([*COMMON, *overrides])
    topology = connect(config.parallel)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        state = build_state(config, topology)
        held = sum(box.values.nbytes for box in state.store.local_boxes())
        losses = run_step(state, config, topology)
        state.store.gradient_squares()
        state.store.step()
    now = peak = 0
    results = recorded.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in _walk(results.experimental_event_tree()) if hasattr(event.extra_fields, "alloc_size")]
    for event in sorted(events, key=lambda event: event.start_time_ns):
        now += event.extra_fields.alloc_size
        peak = max(peak, now)
    return Measured(peak, held, selections(losses, config), tokens_of(config, topology))


def selections(losses: Any, config: Config) -> Tensor:
    """[micro-batches, layers, N] FFN selections of a rank's own tokens."""
    counts = torch.stack(
        [torch.cat(parts) for parts in zip(*([one.counts for one in of] for of in losses), strict=True)]
    )
    return counts[:, :, : config.model.num_experts]


def tokens_of(config: Config, topology: Topology) -> int:
    """Tokens of a micro-batch on a rank."""
    sizes, shape = topology.sizes, batch_shape(config, topology.sizes)
    return shape.sequences * shape.length // (sizes.cp * sizes.tp)


def run_step(state: TrainState, config: Config, topology: Topology) -> Any:
    """Forward and backward of random tokens."""
    shape = batch_shape(config, topology.sizes)
    torch.manual_seed(topology.data_rank)
    batches = []
    for _ in range(shape.num_micro_batches):
        ids = torch.randint(config.model.vocab_size, (shape.sequences, shape.length))
        batches.append(Batch(ids, ids.clone(), torch.ones_like(ids, dtype=torch.bool), None))
    tokens = config.train.global_batch_size * shape.length
    divisors = Divisors(tokens, tokens, tokens, 1)
    weights = config.loss, config.balance.group_loss_weight
    with_mtp = config.model.num_mtp_layers > 0
    return state.engine.run(batches, lambda losses: objective(losses, divisors, *weights), with_mtp)


@dataclass(frozen=True)
class Counted:
    """One rank's step by torch's counter."""

    flops: float
    selections: Tensor  # as of `Measured`
    tokens: int


def count_flops(overrides: Sequence[str]) -> Counted:
    """FLOPs of this rank's step."""
    config = compose([*COMMON, *overrides])
    topology = connect(config.parallel)
    state = build_state(config, topology)
    longcat.ops.grouped.BLOCK = 1  # else a product takes whole blocks of rows, some of them other experts'
    longcat.ops.grouped.MAX_PADDING = 0  # else experts are padded to equally many rows on a CPU with AMX
    with FlopCounterMode(display=False) as counter:
        losses = run_step(state, config, topology)
    return Counted(float(counter.get_total_flops()), selections(losses, config), tokens_of(config, topology))


def mean_routing(counted: Sequence[Counted], ep: int, rank: int) -> Scope:
    """What the planner is to assume of a rank's routers so that all its experts' rows together are those counted."""
    group = counted[rank // ep * ep : (rank // ep + 1) * ep]
    own, each = counted[rank].selections, counted[rank].selections.shape[2] // ep
    experts = slice(rank % ep * each, (rank % ep + 1) * each)
    received = sum(float(one.selections[:, :, experts].sum()) for one in group)
    sent = float(own.sum())
    return Scope(rank, received / sent, sent / own.shape[0] / own.shape[1] / counted[rank].tokens)


def _walk(events: list[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _walk(event.children)


def routing_of(measured: Sequence[Measured], ep: int, rank: int) -> tuple[float, float]:
    """(FFN selections of a token, rows that the rank's experts receive over those that its tokens select), at most."""
    group = measured[rank // ep * ep : (rank // ep + 1) * ep]
    own = measured[rank].selections.sum(2)
    each = measured[rank].selections.shape[2] // ep
    experts = slice(rank % ep * each, (rank % ep + 1) * each)
    received = torch.stack([one.selections[:, :, experts].sum(2) for one in group]).sum(0)
    return float(own.max()) / measured[rank].tokens, float(received.max()) / float(own.max())


def traced(overrides: Sequence[str], ranks: int, scopes: Sequence[Scope]) -> list[Traced]:
    """What the planner says of each of ``scopes``."""
    config = compose([*COMMON, *overrides])
    return [trace(config, ranks, scope) for scope in scopes]


def traced_with_routing(overrides: Sequence[str], measured: Sequence[Measured]) -> list[Traced]:
    """What the planner says of each rank, given what its routers did."""
    ep = compose([*COMMON, *overrides]).parallel.ep
    scopes = []
    for rank in range(len(measured)):
        ffn_experts, imbalance = routing_of(measured, ep, rank)
        scopes.append(Scope(rank=rank, ffn_experts=ffn_experts, imbalance=imbalance))
    return traced(overrides, len(measured), scopes)
