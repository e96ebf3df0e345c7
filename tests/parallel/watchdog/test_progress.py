"""A hang on the device names the rank that has not issued what the others' devices wait for; marks are stand-ins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from parallel.pipeline.spans import traced
from parallel.reduce import to_host
from parallel.torch_internals import start_fake_world
from parallel.watchdog import spans
from parallel.watchdog.diagnosis import HangCause, diagnose, format_message
from parallel.watchdog.events import Event, RankState, SpanKind
from parallel.watchdog.heartbeats import Heartbeat
from parallel.watchdog.progress import DeviceProgress, GroupProgress
from parallel.watchdog.spans import SPANS, device_span, status, wait_span
from tests.parallel.watchdog.heartbeat_cases import NOW, WAITING, WORKING, heartbeats

COUNTS = replace(WAITING, event=Event(SpanKind.EXPERT_COUNTS, layer=3))
DEVICE = replace(WAITING, event=Event(SpanKind.DEVICE), phase=Event(SpanKind.GRADIENT_NORM))


def gather(issued: int, completed: int) -> GroupProgress:
    return GroupProgress("mesh_fsdp_cp_tp", "0-3:1", issued, completed)


def experts(ranks: str, issued: int, completed: int) -> GroupProgress:
    return GroupProgress("expert exchange", ranks, issued, completed)


def test_names_the_rank_whose_gather_others_never_see() -> None:
    """Ranks 0 to 2 wait in spans of their expert groups, each of which is complete; rank 3 is late with a gather."""
    late = heartbeats(
        replace(COUNTS, ranks="0-1:1", groups=(gather(41, 40), experts("0-1:1", 7, 7))),
        replace(COUNTS, ranks="0-1:1", groups=(gather(41, 40), experts("0-1:1", 7, 7))),
        replace(COUNTS, ranks="2-3:1", groups=(gather(41, 40), experts("2-3:1", 7, 7))),
        replace(WORKING, idle_seconds=700.0, groups=(gather(40, 40), experts("2-3:1", 7, 7))),
    )
    without = {rank: replace(one, groups=()) for rank, one in late.items()}
    assert diagnose(0, without, set(), set(), NOW).cause == HangCause.UNKNOWN  # type: ignore[union-attr]
    found = diagnose(0, late, set(), set(), NOW)
    assert found is not None
    assert (found.cause, found.ranks) == (HangCause.STRAGGLER, (3,))
    said = format_message(late[0], found)
    assert 'rank 0 has waited 30 s in step 12 for "expert counts, layer 3" (ep)' in said
    assert (
        "rank 3 (process 43 on host) has not issued collective 41 of the group mesh_fsdp_cp_tp, which ranks 0, 1, "
        in said
    )
    assert '2 wait for on the device (for 700 s at step 12, "forward of micro-batch 1"' in said


def test_follows_groups_to_the_end_of_the_chain() -> None:
    """Rank 0's device waits for rank 1 in a gather, and rank 1's for rank 2 in its expert group."""
    late = heartbeats(
        replace(DEVICE, groups=(gather(9, 8), experts("0", 3, 3))),
        replace(DEVICE, groups=(gather(8, 8), experts("1-2:1", 5, 4))),
        replace(WORKING, groups=(gather(9, 8), experts("1-2:1", 4, 4))),
        replace(DEVICE, groups=(gather(9, 8),)),
    )
    for start in (0, 1, 3):
        found = diagnose(start, late, set(), set(), NOW)
        assert found is not None
        assert (found.cause, found.ranks) == (HangCause.STRAGGLER, (2,)), start


def test_all_have_issued_it() -> None:
    """Nobody is late: the network or a GPU is."""
    found = diagnose(0, heartbeats(*[replace(DEVICE, groups=(gather(9, 8),))] * 4), set(), set(), NOW)
    assert found is not None
    assert (found.cause, found.ranks) == (HangCause.UNKNOWN, ())
    assert "ranks 0, 1, 2, 3) have issued its collective 9, and no device has completed it" in found.reason


def test_completed_groups_leave_the_diagnosis_to_spans() -> None:
    late = heartbeats(replace(WAITING, groups=(gather(9, 9),)), *[replace(WORKING, groups=(gather(9, 9),))] * 3)
    without = {rank: replace(one, groups=()) for rank, one in late.items()}
    assert diagnose(0, late, set(), set(), NOW) == diagnose(0, without, set(), set(), NOW)


def test_heartbeats_carry_the_counts() -> None:
    sent = replace(DEVICE, groups=(gather(9, 8), experts("0-1:1", 3, 3)))
    assert Heartbeat.from_json(sent.to_json()) == sent


class Queue:
    """A device that has come past the first ``done`` marks."""

    def __init__(self) -> None:
        self.made = self.done = 0

    def mark(self) -> Place:
        self.made += 1
        return Place(self, self.made)


class Place:
    """A mark of a `Queue`."""

    def __init__(self, queue: Queue, number: int) -> None:
        self.queue, self.number = queue, number

    def query(self) -> bool:
        return self.number <= self.queue.done


@pytest.fixture
def world() -> Iterator[None]:
    start_fake_world(1, 4)
    yield
    SPANS.progress = None
    dist.destroy_process_group()


@pytest.mark.usefixtures("world")
def test_spans_count_what_is_issued_and_completed() -> None:
    queue = Queue()
    SPANS.progress = progress = DeviceProgress(queue.mark)
    pair, everybody = dist.new_group([1, 2], group_desc="pair"), dist.group.WORLD
    assert everybody is not None
    for group in (pair, everybody, pair):
        with wait_span(Event(SpanKind.WEIGHT_ALL_GATHER), group):
            pass
    queue.done = 2
    names = {one.name: one for one in progress.now()}
    assert names["pair"] == GroupProgress("pair", "1-2:1", 2, 1)
    assert names[everybody.group_desc] == GroupProgress(everybody.group_desc, "0-3:1", 1, 1)
    for _ in range(100):  # marks do not pile up until a heartbeat looks
        queue.done = queue.made
        progress.issued(pair)
    assert progress.now()[0][2:] == (102, 101)
    with pytest.raises(RuntimeError), wait_span(Event(SpanKind.SUM), pair):
        raise RuntimeError("the collective failed")
    assert progress.now()[0].issued == 102


class Sent:
    """A transfer of NCCL: waiting for it queues the wait."""

    def wait(self) -> bool:
        return True


@pytest.mark.usefixtures("world")
def test_messages_of_a_pipeline_are_counted_by_direction() -> None:
    """What is issued counts at once; completed is what the device has come past, where it has a wait queued."""
    queue, world = Queue(), dist.group.WORLD
    SPANS.progress = progress = DeviceProgress(queue.mark)
    launch = traced(lambda operations: [Sent()])  # type: ignore[list-item]
    ops = [dist.P2POp(dist.isend, torch.ones(1), 2, world), dist.P2POp(dist.irecv, torch.ones(1), 2, world)]
    (work,) = launch(ops)
    to, back = progress.now()
    assert to == GroupProgress("messages from rank 1", "1-2:1", 1, 1)
    assert back == GroupProgress("messages from rank 2", "1-2:1", 1, 1)
    work.wait()
    work.wait()  # is one wait
    launch(ops)
    assert [one[2:] for one in progress.now()] == [(2, 0), (2, 0)]
    queue.done = queue.made
    assert [one[2:] for one in progress.now()] == [(2, 2), (2, 2)]


def test_names_the_stage_that_has_not_sent() -> None:
    """Rank 0's device waits for rank 1's gradients, rank 1's for those of rank 2, which hangs in its own work."""

    def messages(sender: int, ranks: str, issued: int, completed: int) -> GroupProgress:
        return GroupProgress(f"messages from rank {sender}", ranks, issued, completed)

    late = heartbeats(
        replace(DEVICE, groups=(messages(0, "0-1:1", 6, 6), messages(1, "0-1:1", 5, 4))),
        replace(DEVICE, groups=(messages(0, "0-1:1", 6, 6), messages(1, "0-1:1", 4, 4), messages(2, "1-2:1", 5, 4))),
        replace(WORKING, idle_seconds=700.0, groups=(messages(2, "1-2:1", 4, 4),)),
        replace(DEVICE, groups=(gather(9, 9),)),
    )
    found = diagnose(0, late, set(), set(), NOW)
    assert found is not None
    assert (found.cause, found.ranks) == (HangCause.STRAGGLER, (2,))


def test_waits_for_the_device_are_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's copies after a step's sums, and the clock of the stream."""
    seen: list[Event | None] = []

    class Values:
        device = torch.device("cuda")

        def cpu(self) -> str:
            now = status()
            assert now.state == RankState.WAITING
            seen.append(now.event)
            return "values"

    class Clock:
        def enter(self) -> None:
            raise AssertionError("the wait for the clock is no wait of the stream")

        leave = enter

        def take(self) -> float:
            Values().cpu()
            return 1.5

    assert to_host(Values()) == "values"  # type: ignore[arg-type, comparison-overlap]
    monkeypatch.setattr(SPANS, "stream_clock", Clock())
    assert spans.take_blocked_seconds() == 1.5
    spans.begin_step(3)
    assert seen == [Event(SpanKind.DEVICE)] * 3
    assert device_span().event.text == "what is queued on the device"
