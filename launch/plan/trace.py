"""One rank's forward and backward, traced without its ranks and without memory: what it would allocate, by kind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

import parallel.fsdp.sharding
import parallel.parallelize
from longcat.errors import ConfigError
from longcat.model import LongCat
from parallel.config import DispatcherKind, Sharding
from parallel.mesh import MeshSizes, Topology, make_topology, resolve_sizes
from parallel.parallelize import check_layout
from parallel.plan.recorder import AllocationRecorder, watch_resizing
from parallel.plan.shapes import RoutingAssumption, shapes_only
from parallel.torch_internals import around_shape_propagation, fake_tensor_mode, start_fake_world
from train.batches import Batch
from train.config import Config
from train.objective import Divisors, objective
from train.run import batch_shape, build_state


@dataclass(frozen=True)
class Traced:
    """Bytes of one rank, as its tensors ask for them; no allocator's rounding and no cache."""

    rank: int
    state: int  # weights and moments
    peak: int  # of a step's forward and backward
    step: int  # of the peak: gradients, activations, gathered weights, rows in flight
    cpu_seconds: float  # that the trace took


def check_traceable(config: Config, sizes: MeshSizes) -> None:
    """Raise ConfigError for what a trace cannot follow, with the nearest layout that it can."""
    parallel, cure = config.parallel, "longcat plan cannot trace it yet; plan with"
    if sizes.pp > 1:
        raise ConfigError(f"parallel.pp={sizes.pp}: {cure} parallel.pp=1 and model.num_layers of one stage")
    if parallel.sharding != Sharding.fsdp:
        raise ConfigError(f"parallel.sharding={parallel.sharding}: {cure} parallel.sharding=fsdp")
    if sizes.ep > 1 and parallel.transport != DispatcherKind.all_to_all:
        raise ConfigError(f"parallel.transport={parallel.transport}: {cure} parallel.transport=all_to_all")
    if config.train.elastic_bits:
        raise ConfigError(f"train.elastic_bits={config.train.elastic_bits}: {cure} train.elastic_bits=0")
    if parallel.compile:
        raise ConfigError(f"parallel.compile=true: {cure} parallel.compile=false")


def trace(config: Config, world_size: int, rank: int = 0, imbalance: float = 1.0) -> Traced:
    """Build ``rank``'s part of the run and trace a step's forward and backward.

    ``imbalance`` is how many times their fair share of rows this rank's experts receive. ``train.dtype`` is decided.
    Uses the operators of a CPU, and this process must have no process group.
    """
    sizes = resolve_sizes(config.parallel, world_size)
    batch = batch_shape(config, sizes)
    check_traceable(config, sizes)
    check_layout(config.model, config.parallel, sizes, batch.length, batch.num_micro_batches)
    begun = time.process_time()
    recorder, mode = AllocationRecorder(), fake_tensor_mode()
    assumed = RoutingAssumption(config.model.expected_ffn_experts, imbalance)
    with (
        _fake_topology(sizes, rank, world_size) as topology,
        _state_without_values(recorder, mode),
        shapes_only(assumed),
        watch_resizing(recorder),
        around_shape_propagation(recorder.ignore, recorder.count_again),
    ):
        state = build_state(config, topology)
        held = recorder.now
        tokens = config.train.global_batch_size * batch.length
        divisors = Divisors(tokens, tokens, tokens, 1)
        weights = config.loss, config.balance.group_loss_weight
        with mode, recorder:
            batches = [_batch(batch.sequences, batch.length) for _ in range(batch.num_micro_batches)]
            recorder.kind = "step"
            with_mtp = config.model.num_mtp_layers > 0
            state.engine.run(batches, lambda losses: objective(losses, divisors, *weights), with_mtp)
    at_peak = recorder.at_peak
    return Traced(rank, held, recorder.peak, at_peak.get("step", 0), time.process_time() - begun)


def _batch(sequences: int, length: int) -> Batch:
    tokens = torch.zeros((sequences, length), dtype=torch.int64)
    return Batch(tokens, tokens.clone(), torch.ones_like(tokens, dtype=torch.bool), None)


@contextmanager
def _fake_topology(sizes: MeshSizes, rank: int, world_size: int) -> Iterator[Topology]:
    """The mesh of ``rank``, all of whose groups are fake."""
    start_fake_world(rank, world_size)
    new_group = dist.new_group

    def fake_group(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **{**kwargs, "backend": "fake"})

    try:
        with patch.object(dist, "new_group", fake_group):
            topology = make_topology(sizes, rank, world_size, torch.device("cpu"))
        yield topology
    finally:
        dist.destroy_process_group()


@contextmanager
def _state_without_values(recorder: AllocationRecorder, mode: Any) -> Iterator[None]:
    """Weights and moments of fake tensors: a model's values are not drawn."""
    store = parallel.parallelize.ShardedAdamW

    def materialise(model: LongCat, _config: Any, _seed: int, device: torch.device) -> None:
        with mode, recorder:
            model.to_empty(device=device)
            parallel.fsdp.sharding._gather_once(model)

    def sharded_adamw(*args: Any) -> Any:
        with mode, recorder:
            return store(*args)

    with (
        patch.object(parallel.parallelize, "materialise", materialise),
        patch.object(parallel.parallelize, "ShardedAdamW", sharded_adamw),
    ):
        yield
