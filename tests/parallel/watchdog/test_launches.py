"""Gloo raises at a collective's launch if it knows that a rank is lost: the message names what the wait would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from longcat.dispatch import Routing
from parallel.collectives.async_collective import start
from parallel.collectives.collective import AllToAll
from parallel.collectives.streams import CURRENT_STREAM
from parallel.expert.dispatchers import GatheredRouting
from parallel.expert.split_sizes import SplitSizes
from parallel.fsdp.collectives import DeferredReduceScatter, PendingReductions, TracedAllGather
from parallel.pipeline.spans import traced
from parallel.reduce import PendingSum
from parallel.sequence import ShardedSequence
from parallel.torch_internals import start_fake_world
from parallel.watchdog.events import Event, RankState, SpanKind
from parallel.watchdog.spans import SPANS, launching, status, wait_span, work_span

RANKS = 4
FORWARD = Event(SpanKind.FORWARD, micro_batch=1)
GATHER = Event(SpanKind.WEIGHT_ALL_GATHER, module="layers.1")
SCATTER = Event(SpanKind.GRADIENT_REDUCE_SCATTER, module="layers.1")
DISPATCH = Event(SpanKind.EXPERT_DISPATCH, 3)
SENT = Event(SpanKind.SEND_HIDDEN_STATES, micro_batch=2, layers=(0, 1))


def lost(*arguments: Any, **keywords: Any) -> Any:
    raise RuntimeError("Connection closed by peer [127.0.0.1]:52367")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[dist.ProcessGroup]:
    """Rank 1 of four, whose collectives and messages fail at their launch."""
    start_fake_world(1, RANKS)
    for name in ("isend", "irecv", "all_to_all_single", "all_reduce"):
        monkeypatch.setattr(dist, name, lost)
    SPANS.clear()
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    SPANS.clear()
    dist.destroy_process_group()


def routing() -> Routing:
    return Routing(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), RANKS, RANKS + 1)


def gather_weights(group: dist.ProcessGroup) -> None:
    TracedAllGather(GATHER)(torch.zeros(RANKS), torch.zeros(1), group, async_op=True)


def reduce_gradients(group: dist.ProcessGroup) -> None:
    scatter = DeferredReduceScatter(SCATTER, None, PendingReductions(), 1)
    scatter(torch.zeros(1), torch.zeros(RANKS), group, dist.ReduceOp.SUM, async_op=True)


def exchange(group: dist.ProcessGroup) -> None:
    start(torch.zeros(RANKS, 2), AllToAll(DISPATCH, group, [1] * RANKS, [1] * RANKS))


def exchange_counts(group: dist.ProcessGroup) -> None:
    SplitSizes([routing()], group, CURRENT_STREAM, 3)


def gather_routing(group: dist.ProcessGroup) -> None:
    GatheredRouting([routing()], group, CURRENT_STREAM, 3)


def count_selections(group: dist.ProcessGroup) -> None:
    sequence = ShardedSequence.__new__(ShardedSequence)
    sequence.module, sequence.shared_group = "layers.3", group
    sequence.start_count(torch.zeros(4))


def send_to_stage(group: dist.ProcessGroup) -> None:
    operation = dist.P2POp(distributed_c10d.isend, torch.zeros(1), 2, group)
    operation.event = SENT  # type: ignore[attr-defined]
    traced(lost)([operation])


@pytest.mark.parametrize(
    "launch,event",
    [
        (gather_weights, GATHER),
        (reduce_gradients, SCATTER),
        (exchange, DISPATCH),
        (exchange_counts, Event(SpanKind.EXPERT_COUNTS, 3)),
        (gather_routing, Event(SpanKind.EXPERT_ROUTING, 3)),
        (count_selections, Event(SpanKind.BALANCE_COUNTS, module="layers.3")),
        (lambda group: PendingSum(torch.zeros(2)), Event(SpanKind.SUM)),
        (send_to_stage, SENT),
    ],
    ids=lambda value: getattr(value, "text", ""),
)
def test_error_at_the_launch_names_the_collective(
    launch: Callable[[dist.ProcessGroup], Any], event: Event, world: dist.ProcessGroup
) -> None:
    with pytest.raises(RuntimeError, match="closed by peer"), work_span(FORWARD):
        launch(world)
    assert status()[:3] == (RankState.FAILED, event, FORWARD)


def test_the_innermost_of_launches_and_waits_is_named(world: dist.ProcessGroup) -> None:
    with pytest.raises(RuntimeError), launching(GATHER, world), wait_span(DISPATCH, world):
        lost()
    assert status()[:2] == (RankState.FAILED, DISPATCH) and status().group is world
    SPANS.clear()
    with launching(GATHER, world):
        assert status()[:2] == (RankState.WORKING, None), "a launch is no wait"
    assert status().state == RankState.WORKING


class Counted:
    """In place of a GPU's counts."""

    def __init__(self) -> None:
        self.collectives = 0

    def issued(self, group: dist.ProcessGroup) -> None:
        self.collectives += 1


@pytest.mark.parametrize("group", ["world", "peers", "all"])
def test_the_first_launch_of_a_group_on_a_gpu_is_a_wait(world: dist.ProcessGroup, group: str) -> None:
    """NCCL connects the ranks there: a rank that does not come would leave the others working, as it seems."""
    SPANS.progress = counted = Counted()  # type: ignore[assignment]
    chosen = {"world": world, "peers": [2], "all": None}[group]
    try:
        with launching(GATHER, chosen):
            assert status()[:2] == (RankState.WAITING, GATHER)
            assert status().group == {"world": list(range(RANKS)), "peers": [2], "all": None}[group]
        assert counted.collectives == 0, "its own wait counts the collective"
        with launching(GATHER, chosen):
            assert status()[:2] == (RankState.WORKING, None)
        with pytest.raises(RuntimeError), launching(SENT, [3]):
            lost()
        assert status()[:2] == (RankState.FAILED, SENT)
    finally:
        SPANS.progress = None
