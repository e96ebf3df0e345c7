"""A model made ready for this rank, in a fixed order: TP → EP → CP → recompute → compile → sharding → values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from longcat.config import ModelConfig
from longcat.model import LongCat, ModelPart
from longcat.ops.fusion import fuse
from parallel.config import OverlapConfig, ParallelConfig, Sharding
from parallel.deepspeed.engine import ZeroEngine
from parallel.elastic import ElasticAdamW, ElasticEngine, VirtualRanks
from parallel.engine import Engine, SequentialEngine
from parallel.expert.placement import apply_expert_parallel, install_dispatchers
from parallel.fsdp.collectives import install_collectives
from parallel.fsdp.sharding import apply_fsdp, materialise
from parallel.kernels import install
from parallel.layout import BatchShape
from parallel.mesh import Axis, Topology
from parallel.overlap import apply_overlap
from parallel.pipeline.stages import num_stages, split, stages_of
from parallel.recompute import apply_recompute
from parallel.sequence import apply_sequence_parallel
from parallel.state_store import MakeOptimizer, ShardedAdamW, Store
from parallel.tensor import apply_tensor_parallel

if TYPE_CHECKING:
    from parallel.pipeline.engine import PipelineEngine


def parallelize(
    config: ModelConfig,
    balance_groups: int,
    parallel: ParallelConfig,
    overlap: OverlapConfig,
    topology: Topology,
    batch: BatchShape,
    compute_dtype: torch.dtype,
    seed: int,
    make_optimizer: MakeOptimizer,
    virtual: VirtualRanks | None = None,
) -> tuple[Engine, Store]:
    """Build this rank's part of a model, with its initial values. A collective.

    Args:
        balance_groups: D of the balance loss.
        batch: the shape of a step's batch on a data rank, or of one turn with ``virtual`` ranks.
        make_optimizer: builds the optimizer over the sharded parameters.
        virtual: the virtual data ranks of `train.elastic_bits`; None without.

    Returns:
        What runs the model, and the store of its state.
    """
    install(topology.device)
    if parallel.sharding != Sharding.fsdp:
        return _under_deepspeed(
            config, balance_groups, parallel, overlap, topology, compute_dtype, seed, make_optimizer
        )
    sizes = topology.sizes
    parts: list[ModelPart | None] = [None]
    if sizes.pp > 1:
        every = split(config, num_stages(parallel.schedule, sizes.pp), batch.length)
        parts = [every[stage] for stage in stages_of(parallel.schedule, sizes.pp, topology.coordinate(Axis.PP))]
    models = []
    for part in parts:
        with torch.device("meta"):
            model = LongCat(config, balance_groups, part)
        apply_tensor_parallel(model, topology)
        apply_expert_parallel(model, topology, parallel.transport)
        set_up(model, parallel, overlap, topology)
        # A pipeline keeps gathered weights through a step: it visits each stage many times
        reshard = parallel.reshard_after_forward and sizes.pp == 1
        apply_fsdp(model, topology, compute_dtype, reshard, hybrid=virtual is None)
        if virtual is None:
            install_collectives(model, topology.device)
        else:
            install_collectives(model, topology.device, virtual.branches(sizes.dp), topology.group(Axis.DP))
        materialise(model, config, seed, topology.device)
        models.append(model)
    make_store = ShardedAdamW if virtual is None else ElasticAdamW
    store = make_store(models, topology, make_optimizer)
    engine: SequentialEngine | PipelineEngine = SequentialEngine(models[0], parallel.accumulate)
    if sizes.pp > 1:
        from parallel.pipeline.engine import PipelineEngine  # torch's pipelines import its compiler: two seconds

        hidden = (batch.sequences, batch.length // (sizes.cp * sizes.tp), config.hidden_size)
        engine = PipelineEngine(models, topology, parallel.schedule, batch.num_micro_batches, hidden, compute_dtype)
    if virtual is None or virtual.turns == 1:
        return engine, store
    return ElasticEngine(engine, virtual.turns), store


def set_up(model: LongCat, parallel: ParallelConfig, overlap: OverlapConfig, topology: Topology) -> None:
    """Apply what comes before the sharding, with FSDP2 and with DeepSpeed: sequence, overlap, recompute, compile."""
    apply_sequence_parallel(model, topology)
    apply_overlap(model, overlap, topology)
    apply_recompute(model, parallel)
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
    install_dispatchers(model, topology, parallel.transport)
    set_up(model, parallel, overlap, topology)
    engine = ZeroEngine(model, topology, parallel, compute_dtype, make_optimizer)
    engine.initialise(seed)
    return engine, engine
