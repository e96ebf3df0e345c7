"""Which rank delays the others: diagnoses of made-up heartbeats."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parallel.watchdog.diagnosis import HangCause, diagnose, format_message, reporter
from parallel.watchdog.events import Event, RankState, SpanKind
from parallel.watchdog.heartbeats import Heartbeat
from tests.parallel.watchdog.heartbeat_cases import FORWARD, NOW, WAITING, WORKING, heartbeats

LATENTS = Event(SpanKind.ATTENTION_LATENTS, module="layers.2")
BATCHED = Event(SpanKind.SEND_GRADIENTS, micro_batch=2, layers=(0, 1), others=(FORWARD,))


def diagnosed(
    me: int, given: dict[int, Heartbeat], unresponsive: set[int] | None = None, dead: set[int] | None = None
) -> tuple[HangCause, tuple[int, ...], str]:
    """(cause, ranks, message) as the rank ``me`` finds them."""
    diagnosis = diagnose(me, given, unresponsive or set(), dead or set(), NOW)
    assert diagnosis is not None
    return diagnosis.cause, diagnosis.ranks, format_message(reporter(me, given, diagnosis), diagnosis)


def test_unresponsive_rank_is_named() -> None:
    """With its last heartbeat and with what the other ranks wait for."""
    given = heartbeats(replace(WAITING, timestamp=NOW - 31, event=LATENTS), WAITING)
    assert diagnosed(1, given, unresponsive={0}) == (
        HangCause.UNRESPONSIVE,
        (0,),
        'rank 1 has waited 30 s in step 12 for "expert dispatch, layer 3" (ep) during forward of micro-batch 1: '
        "rank 0 (process 40 on host) has stopped answering (its last heartbeat 31 s ago: step 12, "
        '"attention latents, layers.2" (cp, tp) during forward of micro-batch 1); '
        "raise parallel.timeout_seconds if it is only slow",
    )


def test_dead_process_is_named_before_an_unresponsive_one() -> None:
    kind, ranks, text = diagnosed(0, heartbeats(WAITING, WAITING, WAITING), unresponsive={2}, dead={1})
    assert (kind, ranks) == (HangCause.DEAD, (1,)) and "rank 1 (process 41 on host) has died" in text
    assert "parallel.timeout_seconds" not in text, "a longer timeout would not help"


def test_first_of_several_missing_ranks_is_named() -> None:
    given = heartbeats(WAITING, replace(WAITING, timestamp=NOW - 5), replace(WAITING, timestamp=NOW - 9), WAITING)
    assert diagnosed(3, given, unresponsive={0, 1, 2})[1] == (2, 1, 0)
    assert "rank 2 (process 42 on host) has stopped" in diagnosed(3, given, unresponsive={0, 1, 2})[2]
    assert "and so have ranks 0, 1;" in diagnosed(3, given, unresponsive={0, 1, 2})[2]


def test_rank_whose_collective_failed_is_not_the_cause() -> None:
    given = heartbeats(
        WAITING, replace(WAITING, state=RankState.FAILED, timestamp=NOW - 9), replace(WAITING, timestamp=NOW - 5)
    )
    assert diagnosed(0, given, dead={1, 2})[1] == (2, 1)


def test_computing_rank_delays_waiting_ranks() -> None:
    kind, ranks, text = diagnosed(0, heartbeats(WAITING, WAITING, WORKING))
    assert (kind, ranks) == (HangCause.STRAGGLER, (2,))
    assert "has not reached it (for 30 s at step 12," in text
    assert '"forward of micro-batch 1" after "weight all-gather, layers.3"' in text


def test_computing_rank_delays_ranks_whose_collective_failed() -> None:
    kind, ranks, text = diagnosed(0, heartbeats(replace(WAITING, state=RankState.FAILED), WORKING))
    assert (kind, ranks) == (HangCause.STRAGGLER, (1,)) and text.startswith("rank 0 failed in step 12 in")


def test_of_computing_ranks_the_furthest_behind_is_named() -> None:
    assert diagnosed(0, heartbeats(WAITING, WORKING, replace(WORKING, step=11, sequence=60)))[1] == (2,)


def test_straggler_reports_for_the_longest_waiting_rank() -> None:
    given = heartbeats(replace(WAITING, idle_seconds=3.0), replace(WAITING, idle_seconds=33.0), WORKING)
    assert diagnosed(2, given)[2].startswith("rank 1 has waited 33 s")


def test_rank_in_an_earlier_collective_is_the_straggler() -> None:
    earlier = replace(WAITING, sequence=50, event=Event(SpanKind.EXPERT_COMBINE, layer=2))
    kind, ranks, text = diagnosed(0, heartbeats(WAITING, earlier, WAITING))
    assert (kind, ranks) == (HangCause.STRAGGLER, (1,)) and '"expert combine, layer 2"' in text


def test_rank_in_another_collective_than_most_is_named() -> None:
    other = replace(WAITING, event=Event(SpanKind.SUM))
    for me in range(4):
        assert diagnosed(me, heartbeats(WAITING, WAITING, other, WAITING))[:2] == (HangCause.STRAGGLER, (2,))


def test_no_rank_is_named_when_all_wait_in_one_collective() -> None:
    kind, ranks, text = diagnosed(0, heartbeats(WAITING, WAITING))
    assert (kind, ranks) == (HangCause.UNKNOWN, ()) and "every rank waits in the same collective" in text


def test_no_diagnosis_while_all_ranks_compute() -> None:
    assert diagnose(0, heartbeats(WORKING, WORKING), set(), set(), NOW) is None


@pytest.mark.parametrize(
    "heartbeat", [WAITING, replace(WORKING, event=None, last_wait=None), replace(WAITING, event=BATCHED)]
)
def test_heartbeat_survives_the_store(heartbeat: Heartbeat) -> None:
    assert Heartbeat.from_json(heartbeat.to_json()) == heartbeat
    assert heartbeat.location.startswith("step 12, ")
