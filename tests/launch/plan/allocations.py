"""Peaks of one rank's step: of a real rank, from its allocator's events, and as the planner traces it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from launch.plan.trace import Traced, trace
from parallel.mesh import connect
from train.batches import Batch
from train.compose import compose
from train.objective import Divisors, objective
from train.run import batch_shape, build_state

COMMON = [
    "model=debug",
    "train.dtype=bfloat16",
    "train.sequence_length=128",
    "train.global_batch_size=8",
    "train.micro_batch_size=2",
]


def real_peak(overrides: list[str]) -> int:
    """Allocator bytes of this rank at their peak, from an empty process to the end of a step's update."""
    config = compose([*COMMON, *overrides])
    topology = connect(config.parallel)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        state = build_state(config, topology)
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
        state.engine.run(batches, lambda losses: objective(losses, divisors, *weights), with_mtp)
        state.store.gradient_squares()
        state.store.step()
    now = peak = 0
    results = recorded.profiler.kineto_results  # type: ignore[union-attr]
    events = [event for event in _walk(results.experimental_event_tree()) if hasattr(event.extra_fields, "alloc_size")]
    for event in sorted(events, key=lambda event: event.start_time_ns):
        now += event.extra_fields.alloc_size
        peak = max(peak, now)
    return peak


def _walk(events: list[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _walk(event.children)


def traced(overrides: list[str], ranks: int, imbalance: float = 1.0) -> Traced:
    """What the planner says of the first rank."""
    return trace(compose([*COMMON, *overrides]), ranks, 0, imbalance)
