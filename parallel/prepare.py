"""A model made ready for this rank, in a fixed order: TP → EP → CP → recompute → compile → sharding → values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longcat.config import ModelConfig
from longcat.model import LongCat, Part
from parallel.compiled import check_compile, compile_dense
from parallel.engine import Engine, InTurn
from parallel.expert import check_experts, spread_experts
from parallel.mesh import Axis, ParallelConfig, Sizes, Topology
from parallel.overlap import OverlapConfig, set_chunks
from parallel.pipeline import Pipeline
from parallel.recompute import recompute
from parallel.sequence import check_length, spread_sequence
from parallel.sharding import materialise, shard
from parallel.stages import check_micro_batches, num_stages, split, stages_of
from parallel.tensor import check_tensor, spread_tensors


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
    check_compile(parallel, sizes)
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
) -> Engine:
    """Build the parts of a model that this rank holds, with their initial values, and what runs them. A collective."""
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
        spread_sequence(model, topology)
        set_chunks(model, overlap)
        recompute(model, parallel.recompute)
        if parallel.compile:
            compile_dense(model)
        # A pipeline keeps gathered weights through a step: it visits each stage many times
        shard(model, topology, compute_dtype, parallel.reshard_after_forward and sizes.pp == 1)
        materialise(model, config, seed, topology.device)
        models.append(model)
    if sizes.pp == 1:
        return InTurn(models[0])
    hidden = (batch.sequences, batch.length // (sizes.cp * sizes.tp), config.hidden_size)
    return Pipeline(models, topology, parallel.schedule, batch.num_micro_batches, hidden, compute_dtype)
