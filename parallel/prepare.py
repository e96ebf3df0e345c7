"""A model made ready for this rank, in a fixed order: TP → EP → CP → recompute → compile → sharding → values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longcat.config import ModelConfig
from longcat.model import LongCat, Part
from longcat.ops.fusion import fuse
from parallel.compiled import check_compile
from parallel.engine import Engine, InTurn
from parallel.expert import check_experts, send_to_experts, spread_experts
from parallel.kernels import install
from parallel.mesh import Axis, ParallelConfig, Sizes, Topology
from parallel.overlap import OverlapConfig, set_overlap
from parallel.pipeline import Pipeline
from parallel.recompute import recompute
from parallel.sequence import check_length, spread_sequence
from parallel.sharded_exchanges import set_exchanges
from parallel.sharding import materialise, shard
from parallel.stages import check_micro_batches, num_stages, split, stages_of
from parallel.store import MakeOptimizer, ShardedAdamW, Store
from parallel.tensor import check_tensor, spread_tensors
from parallel.zero import ZeroEngine
from parallel.zero_setup import check as check_deepspeed


@dataclass(frozen=True)
class BatchShape:
    """What one data rank reads for a step."""

    num_micro_batches: int
    sequences: int  # of a micro-batch
    length: int


def check_layout(
    config: ModelConfig, parallel: ParallelConfig, sizes: Sizes, sequence_length: int, num_micro_batches: int
) -> None:
    """Raise ConfigError where a model or a step cannot be spread over a mesh of these sizes.

    ``num_micro_batches`` are those of one data rank.
    """
    if sizes.pp > 1:
        split(config, num_stages(parallel.schedule, sizes.pp), sequence_length)
        check_micro_batches(parallel.schedule, sizes.pp, num_micro_batches)
    if parallel.sharding != "fsdp":
        check_deepspeed(parallel, sizes)
    check_compile(parallel)
    check_tensor(config, sizes.tp)
    check_experts(config, sizes.ep)
    check_length(sequence_length, sizes.cp, sizes.tp)


def prepare(
    config: ModelConfig,
    balance_groups: int,
    parallel: ParallelConfig,
    overlap: OverlapConfig,
    topology: Topology,
    batch: BatchShape,
    compute_dtype: torch.dtype,
    seed: int,
    make_optimizer: MakeOptimizer,
) -> tuple[Engine, Store]:
    """Build what this rank holds of a model, with initial values: what runs it, and what holds it. A collective."""
    install(topology.device)
    if parallel.sharding != "fsdp":
        return _under_deepspeed(
            config, balance_groups, parallel, overlap, topology, compute_dtype, seed, make_optimizer
        )
    sizes = topology.sizes
    parts: list[Part | None] = [None]
    if sizes.pp > 1:
        every = split(config, num_stages(parallel.schedule, sizes.pp), batch.length)
        parts = [every[stage] for stage in stages_of(parallel.schedule, sizes.pp, topology.coordinate(Axis.PP))]
    models = []
    for part in parts:
        with torch.device("meta"):
            model = LongCat(config, balance_groups, part)
        spread_tensors(model, topology)
        spread_experts(model, topology, parallel.transport)
        _set_up(model, parallel, overlap, topology)
        # A pipeline keeps gathered weights through a step: it visits each stage many times
        shard(model, topology, compute_dtype, parallel.reshard_after_forward and sizes.pp == 1)
        set_exchanges(model, topology.device)
        materialise(model, config, seed, topology.device)
        models.append(model)
    store = ShardedAdamW(models, topology, make_optimizer)
    if sizes.pp == 1:
        return InTurn(models[0]), store
    hidden = (batch.sequences, batch.length // (sizes.cp * sizes.tp), config.hidden_size)
    return Pipeline(models, topology, parallel.schedule, batch.num_micro_batches, hidden, compute_dtype), store


def _set_up(model: LongCat, parallel: ParallelConfig, overlap: OverlapConfig, topology: Topology) -> None:
    """What both sharding engines have done to a model before they take it."""
    spread_sequence(model, topology)
    set_overlap(model, overlap, topology)
    recompute(model, parallel.recompute)
    fuse(parallel.compile)


def _under_deepspeed(
    config: ModelConfig,
    balance_groups: int,
    parallel: ParallelConfig,
    overlap: OverlapConfig,
    topology: Topology,
    compute_dtype: torch.dtype,
    seed: int,
    make_optimizer: MakeOptimizer,
) -> tuple[Engine, Store]:
    with torch.device("meta"):
        model = LongCat(config, balance_groups)
    send_to_experts(model, topology, parallel.transport)
    _set_up(model, parallel, overlap, topology)
    engine = ZeroEngine(model, topology, parallel, compute_dtype, make_optimizer)
    engine.initialise(seed)
    return engine, engine
