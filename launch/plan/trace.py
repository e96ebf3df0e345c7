"""One rank's forward and backward, traced without its ranks and without memory: what it allocates, computes, sends."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed import device_mesh

import parallel.parallelize
from longcat.errors import ConfigError
from longcat.interfaces import install
from longcat.model import LongCat, ModelPart
from longcat.ops.torch_internals import fake_tensor_mode
from parallel.config import DispatcherKind, Offload, ParallelConfig, Sharding
from parallel.deepspeed.setup import (
    BUCKET_NUMEL,
    STAGES,
    CastVocabulary,
    data_parallel_size,
    keep_own_experts,
    parameter_groups,
)
from parallel.expert.placement import install_dispatchers
from parallel.fsdp.sharding import gather_late_units
from parallel.layout import BatchShape, check_layout
from parallel.mesh import MeshSizes, Topology, make_topology, resolve_sizes
from parallel.pipeline.stages import fewest_micro_batches
from parallel.plan.rates import NO_TIME, Rates
from parallel.plan.recorder import AllocationRecorder, Phase, Traffic, Work, recording
from parallel.plan.shapes import RoutingAssumption, shapes_only
from parallel.torch_internals import (
    around_shape_propagation,
    shard_without_compiler,
    start_fake_world,
    without_connection_check,
)
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import work_span
from train.batches import Batch
from train.check import batch_shape
from train.config import Config
from train.objective import Divisors, objective
from train.run import build_state

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Scope:
    """What is traced: a rank, what its routers do, and how much of the run."""

    rank: int = 0
    imbalance: float = 1.0  # rows that this rank's experts receive, over their fair share
    ffn_experts: float | None = None  # FFN selections of a token; None = as many as are expected
    on_gpu: bool = False  # with a GPU's attention and collectives
    rates: Rates = NO_TIME  # by which operators are timed
    layers: int | None = None  # at most so many layers of each stage; None = all
    micro_batches: int | None = None  # at most so many, or the fewest that the schedule runs; None = all


@dataclass(frozen=True)
class Traced:
    """Bytes of one rank, as its tensors ask for them (no allocator's rounding and no cache), its work and messages."""

    scope: Scope
    state: int  # weights and moments
    peak: int  # of a step's forward and backward
    end: int  # of what follows a step's last phase, when no micro-batch is under way
    step: int  # of the peak: gradients, activations, gathered weights, rows in flight
    num_micro_batches: int  # traced
    layers: tuple[int, ...]  # traced, of each stage of the rank
    phases: dict[Phase, Work]
    traffic: dict[tuple[SpanKind, Phase], Traffic]  # by kind and the phase in which it starts
    cpu_seconds: float  # that the trace took

    @property
    def flops(self) -> float:
        return sum(work.flops for work in self.phases.values())


def check_traceable(config: Config, sizes: MeshSizes) -> None:
    """Raise ConfigError for what a trace cannot follow, with the nearest layout that it can."""
    parallel, cure = config.parallel, "longcat plan cannot trace it; plan with"
    if sizes.ep > 1 and parallel.transport != DispatcherKind.all_to_all:
        raise ConfigError(f"parallel.transport={parallel.transport}: {cure} parallel.transport=all_to_all")
    if config.train.elastic_bits:
        raise ConfigError(f"train.elastic_bits={config.train.elastic_bits}: {cure} train.elastic_bits=0")
    if parallel.compile:
        raise ConfigError(f"parallel.compile=true: {cure} parallel.compile=false, which needs no less memory")
    if parallel.sharding == Sharding.zero3:
        raise ConfigError(f"parallel.sharding=zero3: {cure} parallel.sharding=fsdp, which shards the same")
    if parallel.offload != Offload.none:
        raise ConfigError(f"parallel.offload={parallel.offload}: {cure} parallel.offload=none")


def trace(config: Config, world_size: int, scope: Scope | None = None) -> Traced:
    """Build a rank's part of the run and trace a step's forward and backward.

    ``train.dtype`` is decided. This process must have no process group.
    """
    scope = scope or Scope()
    sizes = resolve_sizes(config.parallel, world_size)
    batch = batch_shape(config, sizes)
    check_traceable(config, sizes)
    check_layout(config.model, config.parallel, sizes, batch.length, batch.num_micro_batches)
    traced_batch = _fewer(batch, config.parallel, sizes, scope)
    if scope.layers is not None and sizes.pp == 1:
        layers = min(scope.layers, config.model.num_layers)
        config = replace(config, model=replace(config.model, num_layers=layers))
    begun = time.process_time()
    shard_without_compiler()  # hides the fake mode from torch's compiler; converting real tensors still imports it
    recorder, mode = AllocationRecorder(scope.rates), fake_tensor_mode()
    ffn_experts = config.model.expected_ffn_experts if scope.ffn_experts is None else scope.ffn_experts
    with ExitStack() as stack:
        topology = stack.enter_context(fake_topology(sizes, scope.rank, world_size))
        for context in (
            state_without_values(mode, recorder),
            shapes_only(RoutingAssumption(ffn_experts, scope.imbalance), recorder, scope.on_gpu),
            recording(recorder),
            around_shape_propagation(recorder.ignore, recorder.count_again),
            stages_without_values(scope.layers) if sizes.pp > 1 else nullcontext(),
        ):
            stack.enter_context(context)
        state = build(config, topology, traced_batch, recorder, mode)  # with moments, which the engine does not keep
        engine, held = state.engine, recorder.now
        tokens = config.train.global_batch_size * batch.length
        divisors = Divisors(tokens, tokens, tokens, 1)
        weights = config.loss, config.balance.group_loss_weight
        for model in engine.parts:
            recorder.follow(model.shortcut_layers())
        with mode, recorder:
            batches = [_batch(batch.sequences, batch.length) for _ in range(traced_batch.num_micro_batches)]
            recorder.kind = "step"
            engine.run_turn(batches, lambda losses: objective(losses, divisors, *weights), config.trains_mtp)
    return Traced(
        scope,
        held,
        recorder.peak,
        recorder.end,
        recorder.at_peak.get("step", 0),
        traced_batch.num_micro_batches,
        tuple(model.part.last - model.part.first for model in engine.parts),
        recorder.phases,
        dict(recorder.traffic),
        time.process_time() - begun,
    )


def _fewer(batch: BatchShape, parallel: ParallelConfig, sizes: MeshSizes, scope: Scope) -> BatchShape:
    if scope.micro_batches is None:
        return batch
    fewest = fewest_micro_batches(parallel.schedule, sizes.pp) if sizes.pp > 1 else 1
    return replace(batch, num_micro_batches=min(batch.num_micro_batches, max(scope.micro_batches, fewest)))


def build(config: Config, topology: Topology, batch: BatchShape, recorder: AllocationRecorder, mode: Any) -> Any:
    if config.parallel.sharding != Sharding.fsdp:
        return ZeroModel(config, topology, recorder, mode)
    with patch("train.run.batch_shape", lambda *_: batch):
        return build_state(config, topology)


class ZeroModel:
    """A model as DeepSpeed's ZeRO 1 and 2 compute with it, and the buffers that these allocate beside it.

    DeepSpeed itself reads addresses, which tensors without memory do not have. So its buffers are a model of it:
    masters and moments in equal flat parts; a bucket that gradients go to, as long as a backward runs; under ZeRO-2 the
    gradients of each weight that reaches into this rank's part, whole; under ZeRO-1, between micro-batches, all
    gradients and the bucket.
    """

    def __init__(self, config: Config, topology: Topology, recorder: AllocationRecorder, mode: Any) -> None:
        with torch.device("meta"):
            model = LongCat(config.model, config.balance.num_groups)
        install_dispatchers(model, topology, config.parallel.transport)
        parallel.parallelize.set_up(model, config.parallel, config.overlap, topology)
        keep_own_experts(model, topology)
        dtype = getattr(torch, config.train.dtype)
        if dtype is not torch.float32:
            install(model, vocabulary=lambda _: CastVocabulary(dtype))
        self.engine, self.parts = self, [model]
        self.stage = STAGES[config.parallel.sharding]
        numels = [[one.numel() for one in group["params"]] for group in parameter_groups(model, topology.sizes.ep)]
        ranks = [
            data_parallel_size(topology) // (topology.sizes.ep if "moe" in group else 1)
            for group in parameter_groups(model, topology.sizes.ep)
        ]
        share = sum(-(-sum(group) // count) for group, count in zip(numels, ranks, strict=True))
        self.bucket_numel = min(BUCKET_NUMEL, sum(map(sum, numels)))
        self.grads_numel = sum(map(sum, numels))
        self.partition_numel = sum(
            reaching_into(group, topology.data_rank % count, count) for group, count in zip(numels, ranks, strict=True)
        )
        with mode, recorder:
            model.to_empty(device=topology.device)
            self.optimizer_state = torch.empty(3 * share)
        self.kept: list[torch.Tensor] = []  # between micro-batches
        for weight in model.parameters():  # DeepSpeed takes a gradient into its bucket as soon as it is there
            weight.register_post_accumulate_grad_hook(_drop_gradient)

    def run_turn(self, micro_batches: list[Batch], objective: Any, mtp: bool) -> None:
        model = self.parts[0]
        for number, batch in enumerate(micro_batches, start=1):
            with work_span(Event(SpanKind.FORWARD, micro_batch=number)):
                losses = model(batch.tokens, batch.labels, batch.valid, batch.documents, mtp=mtp)
            with work_span(Event(SpanKind.BACKWARD, micro_batch=number)):
                total = objective(losses)
                bucket = torch.empty(0 if self.stage == 1 and self.kept else self.bucket_numel)
                total.backward()
                if self.stage == 2 and not self.kept:
                    self.kept = [torch.empty(self.partition_numel)]
                elif self.stage == 1 and not self.kept and number < len(micro_batches):
                    self.kept = [torch.empty(self.grads_numel), bucket]
                del bucket
            del losses, total


def reaching_into(numels: list[int], part: int, parts: int) -> int:
    """Elements of the tensors that reach into one of equal parts of all of them, laid end to end."""
    size, start, found = -(-sum(numels) // parts), 0, 0
    for numel in numels:
        found += numel if start < (part + 1) * size and start + numel > part * size else 0
        start += numel
    return found


def _drop_gradient(weight: torch.Tensor) -> None:
    weight.grad = None


def _batch(sequences: int, length: int) -> Batch:
    tokens = torch.zeros((sequences, length), dtype=torch.int64)
    return Batch(tokens, tokens.clone(), torch.ones_like(tokens, dtype=torch.bool), None)


@contextmanager
def fake_topology(sizes: MeshSizes, rank: int, world_size: int, device: torch.device = CPU) -> Iterator[Topology]:
    """The mesh of ``rank``, all of whose groups are fake. Groups of other ranks alone are not made."""
    start_fake_world(rank, world_size)
    new_group = dist.new_group

    def fake_group(ranks: list[int], *args: Any, **kwargs: Any) -> Any:
        if rank not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return new_group(ranks, *args, **{**kwargs, "backend": "fake"})

    try:
        with patch.object(dist, "new_group", fake_group), patch.object(device_mesh, "new_group", fake_group):
            topology = make_topology(sizes, rank, world_size, device)
        yield topology
    finally:
        dist.destroy_process_group()


@contextmanager
def stages_without_values(layers: int | None) -> Iterator[None]:
    """Stages of at most ``layers`` layers, from their first on, that count micro-batches instead of reading numbers."""
    from parallel.pipeline.engine import StageModule  # imports torch's compiler

    split = parallel.parallelize.split

    def shorter(*args: Any) -> list[ModelPart]:
        parts = split(*args)
        return [replace(part, last=min(part.last, part.first + (layers or part.last))) for part in parts]

    def next_number(self: Any, micro_batch: torch.Tensor) -> int:
        return len(self.found)  # a stage's forwards come in order

    with (
        patch.object(parallel.parallelize, "split", shorter),
        patch.object(StageModule, "number_of", next_number),
        without_connection_check(),
    ):
        yield


@contextmanager
def state_without_values(*modes: Any) -> Iterator[None]:
    """Weights and moments of fake tensors, made under these modes: a model's values are not drawn."""
    store = parallel.parallelize.ShardedAdamW

    @contextmanager
    def under_modes() -> Iterator[None]:
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            yield

    def materialise(model: LongCat, _config: Any, _seed: int, device: torch.device) -> None:
        with under_modes():
            model.to_empty(device=device)
            gather_late_units(model)

    def sharded_adamw(*args: Any) -> Any:
        with under_modes():
            return store(*args)

    with (
        patch.object(parallel.parallelize, "materialise", materialise),
        patch.object(parallel.parallelize, "ShardedAdamW", sharded_adamw),
    ):
        yield
