"""Streams without a GPU: on recording fakes, a layer reads nothing before its write and frees nothing early.

Each wait, record and `record_stream` of the code is left out once: the recorder must complain.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor, nn

import longcat.ops.recomputed
from longcat.config import ModelConfig
from longcat.dispatch import LocalDispatcher
from longcat.interfaces import UnshardedSequence
from longcat.layer import ShortcutLayer
from longcat.recompute_values import Value
from longcat.rope import rotary_angles
from parallel.collectives.async_collective import AsyncCollective, start, wait, wait_for_all
from parallel.collectives.collective import AllGather, Collective
from parallel.collectives.streams import SideStreamContext
from parallel.config import ParallelConfig, Recompute
from parallel.expert.dispatchers import AllGatherDispatcher, AllToAllDispatcher
from parallel.mesh import make_topology, resolve_sizes, world_from_environment
from parallel.pipeline.weight_grad_store import WeightGradQueue, defer_weight_gradients
from parallel.recompute import checkpoint_method, recompute_layer
from parallel.watchdog.events import Event, SpanKind
from tests.parallel.collectives.fake_streams import RecordedCuda, Recorder, Site
from tests.support.distributed import run_ranks

CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    num_layers=2,
    num_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    ffn_hidden_size=24,
    expert_hidden_size=8,
    num_experts=4,
    num_zero_experts=2,
    top_k=3,
)

EVERY_VALUE = ParallelConfig(recompute=Recompute.selective, recompute_list=list(Value))


class Case(NamedTuple):
    """How two layers are run."""

    chunks: int = 2
    after_attention: bool = False
    recomputed: bool = False
    experts_stream: bool = False
    deferred: bool = False  # weight gradients, as in a zero-bubble pipeline
    all_gather: bool = False
    in_flight: int = 1  # micro-batches whose backwards follow all forwards, as in a pipeline
    local: bool = False  # all experts on this rank
    balanced: bool = True  # the loss holds the balance loss
    values: bool = False  # the backward computes every value again that it can


CASES = [
    Case(chunks, after_attention, recomputed)
    for chunks in (1, 2, 3)
    for after_attention in (False, True)
    for recomputed in (False, True)
]
CASES += [Case(recomputed=recomputed, all_gather=True) for recomputed in (False, True)]
CASES += [
    Case(2, after_attention, recomputed, experts_stream=True, deferred=deferred)
    for after_attention in (False, True)
    for recomputed in (False, True)
    for deferred in (False, True)
]
CASES += [Case(recomputed=recomputed, deferred=True, in_flight=2) for recomputed in (False, True)]
CASES += [Case(recomputed=recomputed, local=True) for recomputed in (False, True)]
CASES += [Case(recomputed=True, balanced=False)]
CASES += [Case(values=True), Case(values=True, local=True), Case(values=True, experts_stream=True, deferred=True)]
MUTATED = [case for case in CASES if case.chunks == 2 and not case.after_attention]


@pytest.fixture(scope="module", autouse=True)
def _one_rank() -> Iterator[None]:
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Exchanging(UnshardedSequence):
    """Gathers latents from a group of one rank, as context parallelism does."""

    def __init__(self) -> None:
        self.group, self.other = dist.new_group([0]), dist.new_group([0])

    def start_keys(self, latents: Tensor) -> AsyncCollective:
        return start(latents, AllGather(Event(SpanKind.ATTENTION_LATENTS), self.group))

    def wait_keys(self, handle: AsyncCollective) -> Tensor:
        return wait(handle)[0]

    def start_count(self, counts: Tensor) -> Any:
        total = counts.clone()
        return dist.all_reduce(total, group=self.other, async_op=True), total

    def wait_count(self, handle: Any) -> Tensor:
        handle[0].wait()
        return handle[1]  # type: ignore[no-any-return]


def layers() -> list[ShortcutLayer]:
    """Two layers with the same values in each call."""
    torch.manual_seed(0)
    made = [ShortcutLayer(CONFIG, 1) for _ in range(2)]
    for layer in made:
        for name, value in (*layer.named_parameters(), *layer.named_buffers()):
            nn.init.zeros_(value) if "bias" in name else nn.init.normal_(value, std=0.3)
    return made


def compute(
    stack: list[ShortcutLayer], recorder: Recorder | None = None, in_flight: int = 1, balanced: bool = True
) -> list[Tensor]:
    """Equal micro-batches forward, then all backward; returns the last one's result and input gradient."""
    angles = rotary_angles(torch.arange(8), CONFIG.qk_rope_head_dim, 1e4)
    losses = []
    for _ in range(in_flight):
        torch.manual_seed(1)
        given = torch.randn(2, 8, CONFIG.hidden_size, requires_grad=True)
        x, balance = given, torch.zeros(())
        for layer in stack:
            x, statistics = layer(x, angles)
            balance = balance + statistics.balance
            del statistics
        losses.append(x.square().sum() + balance if balanced else x.square().sum())
        result = x.detach()
        del x, balance
    if recorder is not None:
        recorder.forward_waits = recorder.host_waits
    while losses:
        losses.pop(0).backward() if recorder is None else recorder.backward(losses.pop(0))
    assert given.grad is not None
    return [result, given.grad]


def weight_gradients(stack: nn.Module) -> list[Tensor]:
    return [weight.grad for weight in stack.parameters() if weight.grad is not None]


def watched(case: Case, without: Site | None = None) -> tuple[Recorder, list[Tensor]]:
    """`compute` under a recorder, with collectives on a side stream."""
    recorder = Recorder(without)
    stack = nn.ModuleList(layers())
    streams = SideStreamContext(torch.device("cpu"), RecordedCuda(recorder), case.experts_stream)
    exchange, sequence, queue = dist.new_group([0]), Exchanging(), WeightGradQueue()
    for layer in stack:
        moe = layer.mlp
        moe.num_chunks, moe.after_attention, moe.expert_stream = case.chunks, case.after_attention, streams.experts
        transport = AllGatherDispatcher if case.all_gather else AllToAllDispatcher
        moe.dispatcher = LocalDispatcher(streams.to_host) if case.local else transport(exchange, 0, streams)
        moe.sequence = layer.self_attn[0].sequence = layer.self_attn[1].sequence = sequence
        if case.recomputed:
            checkpoint_method(layer, "forward")
        if case.values:
            recompute_layer(layer, EVERY_VALUE)
    if case.deferred:
        defer_weight_gradients(stack, queue)
    with recorder, mock.patch.object(longcat.ops.recomputed, "current_stream", lambda: recorder.current):
        found = compute(list(stack), recorder, case.in_flight, case.balanced)  # type: ignore[arg-type]
        queue.take()()
        recorder.check_freed()
    return recorder, found + [grad / case.in_flight for grad in weight_gradients(stack)]


@cache
def sound(case: Case) -> tuple[Recorder, list[Tensor]]:
    """`watched` with nothing left out, run once for all tests."""
    return watched(case)


@cache
def plain(balanced: bool) -> list[Tensor]:
    stack = nn.ModuleList(layers())
    return compute(list(stack), balanced=balanced) + weight_gradients(stack)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_accesses_are_ordered_and_no_memory_freed_early(case: Case) -> None:
    recorder, found = sound(case)
    assert recorder.complaints == []
    assert recorder.uncounted == []
    assert (recorder.num_operators["side"] > 0) != case.local
    assert (recorder.num_operators["experts"] > 0) == case.experts_stream
    for ours, theirs in zip(found, plain(case.balanced), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


class Slow(Collective):
    """A collective that notes whether it has been waited for."""

    waited = False

    def launch(self, x: Tensor) -> tuple[Any, Tensor]:
        return self, x.clone()

    def wait(self) -> None:
        self.waited = True

    def elements_sent(self, x: Tensor) -> float:
        return 0.0

    def reverse(self) -> Collective:
        return self


def test_region_waits_for_its_collectives_even_on_error() -> None:
    before, inside = Slow("before", dist.group.WORLD), Slow("inside", dist.group.WORLD)
    x = torch.ones(2, requires_grad=True)
    start(x, before)

    def stopped_early() -> Tensor:
        with wait_for_all():
            pending_collective = start(x * 2, inside)
            nested = wait(start(x, Slow("nested", dist.group.WORLD)))
            if torch._C._current_graph_task_id() != -1:  # in the recomputation
                raise InterruptedError
            return wait(pending_collective) * nested

    result = torch.utils.checkpoint.checkpoint(stopped_early, use_reentrant=False)
    inside.waited = False
    with pytest.raises(InterruptedError):
        result.sum().backward()
    assert inside.waited and not before.waited


@cache
def without(site: Site, case: Case) -> list[str]:
    return watched(case, site)[0].complaints


def test_every_wait_and_record_stream_is_needed() -> None:
    places: dict[Site, list[Case]] = {}
    for case in MUTATED:
        for site in sound(case)[0].sites:
            places.setdefault(site, []).append(case)
    assert len(places) > 20
    superfluous = [site for site, cases in places.items() if not any(without(site, case) for case in cases)]
    assert superfluous == []


@pytest.mark.parametrize("case", CASES, ids=str)
def test_host_waits_once_per_layer_and_never_in_backward(case: Case) -> None:
    recorder, _ = sound(case)
    forwards = 2 * case.in_flight  # of layers
    assert recorder.forward_waits == forwards
    assert recorder.host_waits == (2 * forwards if case.recomputed else forwards)
    assert recorder.host_reads == []


def exchange_groups() -> tuple[set[str], set[str]]:
    """Names of the groups of the layers' collectives, and of those of gradient reduction."""
    rank, _, ranks = world_from_environment()
    dist.init_process_group("gloo")
    topology = make_topology(resolve_sizes(ParallelConfig(cp=2, ep=2), ranks), rank, ranks, torch.device("cpu"))
    meshes = (topology.dense, topology.replicated, topology.experts["efsdp"], topology.experts["ep"], topology.shared)
    summed = {mesh.get_group().group_name for mesh in meshes} | {dist.group.WORLD.group_name}
    return {topology.expert_exchange.group_name, topology.context_exchange.group_name}, summed


def test_overlapped_collectives_have_their_own_groups() -> None:
    for exchange, summed in run_ranks(exchange_groups, 2):
        assert len(exchange) == 2 and not exchange & summed
