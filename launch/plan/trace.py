"""One rank's forward and backward without memory or other ranks: the project's own code on fake tensors.

Process groups are torch's fake ones and tensors have shapes only, so one process stands for any rank of any number.
Experts get evenly divided rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

import longcat.ops.embedding
import longcat.ops.grouped
import longcat.ops.permute
import longcat.ops.rows
import parallel.collectives.collective
import parallel.collectives.point_to_point
import parallel.expert.dispatchers
import parallel.fsdp.collectives
from launch.plan import shapes
from launch.plan.recorder import Recorder
from longcat.dispatch import LocalDispatcher, LocalPending
from longcat.ops.torch_library import PLAIN
from parallel import parallelize
from parallel.collectives.point_to_point import Messages
from parallel.expert.dispatchers import SplitSizes
from parallel.fsdp.sharding import _gather_once
from parallel.mesh import MeshSizes, Topology, make_topology, resolve_sizes
from train.batches import Batch
from train.config import Config
from train.objective import Divisors, objective
from train.run import batch_shape, build_state

WITH_OPERATORS = (longcat.ops.rows, longcat.ops.permute, longcat.ops.embedding, parallel.expert.dispatchers)
WITH_GATHERS = (parallel.collectives.point_to_point, parallel.collectives.collective, parallel.fsdp.collectives)


@dataclass(frozen=True)
class Traced:
    """Bytes of one rank in a step, up to the end of its backward."""

    state: int  # weights and moments
    peak: int
    at_peak: dict[str, int]  # by kind


def trace(config: Config, world: int, rank: int) -> Traced:
    """Forward and backward of a step on one rank of ``world``. There must be no process group.

    ``config.train.dtype`` must be decided.
    """
    recorder, mode = Recorder(), FakeTensorMode(allow_non_fake_inputs=True)
    sizes = resolve_sizes(config.parallel, world)
    with _fake_topology(sizes, world, rank) as topology, ExitStack() as stack:
        for context in _patches(config, recorder, mode):
            stack.enter_context(context)
        state = build_state(config, topology)
        held = recorder.now
        shape, train = batch_shape(config, sizes), config.train
        tokens = train.global_batch_size * train.sequence_length
        divisors = Divisors(tokens, tokens, tokens, 1)
        with mode, recorder:
            recorder.kind = "step"
            batches = [_batch(shape.sequences, shape.length) for _ in range(shape.num_micro_batches)]
            weights = config.loss, config.balance.group_loss_weight
            state.engine.run(batches, lambda losses: objective(losses, divisors, *weights), _has_mtp(config))
        return Traced(held, recorder.peak, recorder.at_peak)


def _has_mtp(config: Config) -> bool:
    return config.model.num_mtp_layers > 0


def _batch(sequences: int, length: int) -> Batch:
    tokens = torch.zeros((sequences, length), dtype=torch.int64)
    return Batch(tokens, tokens.clone(), torch.ones_like(tokens, dtype=torch.bool), None)


@contextmanager
def _fake_topology(sizes: MeshSizes, world: int, rank: int) -> Iterator[Topology]:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    new_group = dist.new_group
    try:
        with patch.object(dist, "new_group", lambda *args, **options: new_group(*args, **{**options, "backend": "fake"})):
            topology = make_topology(sizes, rank, world, torch.device("cpu"))
        yield topology
    finally:
        dist.destroy_process_group()


def _patches(config: Config, recorder: Recorder, mode: FakeTensorMode) -> Iterator[Any]:
    """Contexts in which a rank is built and run: operators in their plain versions, assumed numbers of rows."""

    def rows_of(tokens: int) -> int:
        return round(tokens * config.model.expected_ffn_experts)

    def plan(indices: Any, num_experts: int, num_routed: int, num_rows: int | None = None) -> Any:
        known = rows_of(indices.shape[0]) if num_rows is None else num_rows
        return PLAIN[longcat.ops.permute._plan](indices, num_experts, num_routed, known)

    by_shape = {
        longcat.ops.permute._plan: plan,
        longcat.ops.embedding.embedding_gradient: shapes.embedding_gradient,
    }
    for module in WITH_OPERATORS:
        for name, value in list(vars(module).items()):
            if isinstance(value, torch._ops.OpOverload) and value in PLAIN:
                yield patch.object(module, name, by_shape.get(value, PLAIN[value]))
    yield patch.object(longcat.ops.rows, "_sum_rows", shapes.sum_rows)
    yield patch.object(longcat.ops.grouped, "grouped_product", shapes.grouped_product)
    yield patch.object(longcat.ops.grouped, "grouped_sum", shapes.grouped_sum)
    for module in WITH_GATHERS:
        if hasattr(module, "all_gather"):
            yield patch.object(module, "all_gather", _all_gather)

    def start_dispatch(self: LocalDispatcher, chunks: Any) -> list[LocalPending]:
        return [LocalPending(x, routing, partial(rows_of, x.shape[0])) for x, routing in chunks]

    counted = SplitSizes.__init__

    def remember(self: Any, routings: Any, *args: Any) -> None:
        counted(self, routings, *args)
        ranks = self.group.size()
        self.assumed = [[rows_of(one.indices.shape[0]) // ranks for one in routings] for _ in range(ranks)]

    yield patch.object(LocalDispatcher, "start_dispatch", start_dispatch)
    yield patch.object(SplitSizes, "__init__", remember)
    for name in ("sent", "received"):
        yield patch.object(SplitSizes, name, property(lambda self: self.assumed))
    for name in ("longcat.dispatch.padded_capacity", "parallel.expert.dispatchers.padded_capacity"):
        yield patch(name, lambda counts, like: None)

    def materialise(model: Any, model_config: Any, seed: int, device: torch.device) -> None:
        with mode, recorder:
            model.to_empty(device=device)
            _gather_once(model)

    make_store = parallelize.ShardedAdamW

    def store(*args: Any) -> Any:
        with mode, recorder:
            return make_store(*args)

    yield patch.object(parallelize, "materialise", materialise)
    yield patch.object(parallelize, "ShardedAdamW", store)
    from torch.distributed.pipelining.schedules import InferenceMode

    def has_warmed_up(schedule: Any, stages: Any, *_: Any) -> None:
        for stage in stages:
            stage._inference_mode = InferenceMode.STATIC

    # torch's schedules try their connections once and read the result
    yield patch("torch.distributed.pipelining.schedules._PipelineSchedule._warmup_p2p", has_warmed_up)
    yield recorder.hooks()


def _all_gather(out: Any, x: Any, group: Any) -> Messages:
    """`point_to_point.all_gather` on a CPU; fake tensors have no address to compare."""
    own = out[group.rank()]
    if own.untyped_storage()._cdata != x.untyped_storage()._cdata:
        own.copy_(x)
    return Messages("all-gather", group, [own] * group.size(), list(out))
