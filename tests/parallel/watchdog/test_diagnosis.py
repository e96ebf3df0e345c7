"""The diagnosis names the rank that delays the others, from made-up heartbeats."""

from __future__ import annotations

from dataclasses import replace

import pytest

from parallel.watchdog.diagnosis import (
    DEAD,
    FAILED,
    STRAGGLER,
    UNKNOWN,
    UNRESPONSIVE,
    Heartbeat,
    diagnose,
    format_message,
    reporter,
)
from tests.parallel.watchdog.heartbeat_cases import NOW, WAITING, WORKING, heartbeats


def said(
    me: int, given: dict[int, Heartbeat], silent: set[int] | None = None, gone: set[int] | None = None
) -> tuple[str, tuple[int, ...], str]:
    """(kind of blame, ranks, the sentence) as ``me`` says it."""
    diagnosis = diagnose(me, given, silent or set(), gone or set(), NOW)
    assert diagnosis is not None
    return diagnosis.kind, diagnosis.ranks, format_message(reporter(me, given, diagnosis), diagnosis)


def test_unresponsive_rank_is_named() -> None:
    """With its last heartbeat and with what the other ranks wait for."""
    given = heartbeats(replace(WAITING, wall=NOW - 31, step=12, what="attention latents, layer 2", group="tp"), WAITING)
    assert said(1, given, silent={0}) == (
        UNRESPONSIVE,
        (0,),
        'rank 1 has waited 30 s in step 12 for "expert dispatch, layer 3" (ep) of forward of micro-batch 1: '
        "rank 0 (process 40 on host) has stopped answering (its last sign 31 s ago: step 12, "
        '"attention latents, layer 2" (tp) of forward of micro-batch 1); '
        "raise parallel.timeout_seconds if it is only slow",
    )


def test_dead_process_is_named_before_an_unresponsive_one() -> None:
    kind, ranks, text = said(0, heartbeats(WAITING, WAITING, WAITING), silent={2}, gone={1})
    assert (kind, ranks) == (DEAD, (1,)) and "rank 1 (process 41 on host) is gone" in text
    assert "parallel.timeout_seconds" not in text, "no time-out brings it back"


def test_first_of_several_missing_ranks_is_named() -> None:
    given = heartbeats(WAITING, replace(WAITING, wall=NOW - 5), replace(WAITING, wall=NOW - 9), WAITING)
    assert said(3, given, silent={0, 1, 2})[1] == (2, 1, 0)
    assert "rank 2 (process 42 on host) has stopped" in said(3, given, silent={0, 1, 2})[2]
    assert "and so are ranks 0, 1;" in said(3, given, silent={0, 1, 2})[2]


def test_rank_whose_collective_failed_is_not_the_cause() -> None:
    given = heartbeats(WAITING, replace(WAITING, state=FAILED, wall=NOW - 9), replace(WAITING, wall=NOW - 5))
    assert said(0, given, gone={1, 2})[1] == (2, 1)


def test_computing_rank_delays_waiting_ranks() -> None:
    kind, ranks, text = said(0, heartbeats(WAITING, WAITING, WORKING))
    assert (kind, ranks) == (STRAGGLER, (2,))
    assert "has not come to it (for 30 s at step 12," in text
    assert '"forward of micro-batch 1" after "gathered weights, layers.3"' in text


def test_computing_rank_delays_ranks_whose_collective_failed() -> None:
    kind, ranks, text = said(0, heartbeats(replace(WAITING, state=FAILED), WORKING))
    assert (kind, ranks) == (STRAGGLER, (1,)) and text.startswith("rank 0 could not finish step 12's")


def test_of_computing_ranks_the_furthest_behind_is_named() -> None:
    assert said(0, heartbeats(WAITING, WORKING, replace(WORKING, step=11, sequence=60)))[1] == (2,)


def test_straggler_reports_for_the_longest_waiting_rank() -> None:
    given = heartbeats(replace(WAITING, still_seconds=3.0), replace(WAITING, still_seconds=33.0), WORKING)
    assert said(2, given)[2].startswith("rank 1 has waited 33 s")


def test_rank_in_an_earlier_collective_is_the_straggler() -> None:
    earlier = replace(WAITING, sequence=50, what="expert combine, layer 2")
    kind, ranks, text = said(0, heartbeats(WAITING, earlier, WAITING))
    assert (kind, ranks) == (STRAGGLER, (1,)) and '"expert combine, layer 2"' in text


def test_rank_in_another_collective_than_most_is_named() -> None:
    other = replace(WAITING, what="sum over all ranks")
    for me in range(4):
        assert said(me, heartbeats(WAITING, WAITING, other, WAITING))[:2] == (STRAGGLER, (2,))


def test_no_rank_is_named_when_all_wait_in_one_collective() -> None:
    kind, ranks, text = said(0, heartbeats(WAITING, WAITING))
    assert (kind, ranks) == (UNKNOWN, ()) and "every rank waits in the same place" in text


def test_no_diagnosis_while_all_ranks_compute() -> None:
    assert diagnose(0, heartbeats(WORKING, WORKING), set(), set(), NOW) is None


@pytest.mark.parametrize("heartbeat", [WAITING, replace(WORKING, what="", before="")])
def test_heartbeat_survives_the_store(heartbeat: Heartbeat) -> None:
    assert Heartbeat.parse(heartbeat.text()) == heartbeat
    assert heartbeat.place.startswith("step 12, ")
