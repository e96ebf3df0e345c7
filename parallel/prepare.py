"""A model made ready for this rank, in a fixed order: TP → EP → CP → recompute → compile → sharding → values."""

from __future__ import annotations

import torch

from longcat.config import ModelConfig
from longcat.model import LongCat, Part
from parallel.compiled import check_compile, compile_dense
from parallel.expert import check_experts, spread_experts
from parallel.mesh import ParallelConfig, Sizes, Topology
from parallel.overlap import OverlapConfig, set_chunks
from parallel.recompute import recompute
from parallel.sequence import check_length, spread_sequence
from parallel.sharding import materialise, shard
from parallel.tensor import check_tensor, spread_tensors


def check_model(config: ModelConfig, parallel: ParallelConfig, sizes: Sizes, sequence_length: int) -> None:
    """Raise ConfigError where a model or a sequence cannot be spread over a mesh of these sizes."""
    check_compile(parallel, sizes)
    check_tensor(config, sizes.tp)
    check_experts(config, sizes.ep)
    check_length(sequence_length, sizes.cp, sizes.tp)


def prepare(
    config: ModelConfig,
    balance_groups: int,
    part: Part | None,
    parallel: ParallelConfig,
    overlap: OverlapConfig,
    topology: Topology,
    compute_dtype: torch.dtype,
    seed: int,
) -> LongCat:
    """Build one part (None = all) of a model as this rank holds it, with its initial values. A collective."""
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
    reshard = parallel.reshard_after_forward and topology.sizes.pp == 1
    shard(model, topology, compute_dtype, reshard)
    materialise(model, config, seed, topology.device)
    return model
