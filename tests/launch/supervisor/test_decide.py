"""Causes from exit.json, and what follows them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.supervisor.causes import Cause, Fault, find_fault
from launch.supervisor.decide import MAX_PAUSE_FACTOR, Again, End, Start, count_fruitless, decide

CODES = {
    Cause.done: 0,
    Cause.configuration: 2,
    Cause.stop: 3,
    Cause.unhealthy: 4,
    Cause.corruption: 5,
}


def start(cause: Cause, before: int, step: int) -> Start:
    return Start(Fault(cause, CODES.get(cause, 1), "…"), before, step)


@pytest.mark.parametrize(
    ("code", "codes", "written", "cause", "ranks"),
    [
        (0, {}, {"code": 0}, Cause.done, ()),
        (2, {0: 2}, {"code": 2}, Cause.configuration, ()),
        (3, {}, {"code": 3}, Cause.stop, ()),
        (4, {1: 4}, {"code": 4}, Cause.unhealthy, ()),
        (5, {1: 5}, {"finding": {"ranks": [{"rank": 3, "host": "b"}]}}, Cause.corruption, (3,)),
        (1, {1: -9}, None, Cause.crash, (1,)),
        (1, {0: 1, 1: -9}, {"hang": {"kind": "dead", "ranks": [{"rank": 1, "host": "a"}]}}, Cause.crash, (1,)),
        (1, {0: 1}, {"hang": {"kind": "unresponsive", "ranks": [{"rank": 2, "host": "a"}]}}, Cause.hang, (2,)),
        (1, {0: 1}, {"hang": {"kind": "unknown", "ranks": []}}, Cause.hang, ()),
        (1, {0: 1}, {"cause": "out_of_memory"}, Cause.out_of_memory, ()),
        (1, {0: 1}, {"cause": "disk_full"}, Cause.disk_full, ()),
        (1, {0: 1}, {"cause": "another"}, Cause.crash, (0,)),
    ],
)
def test_causes_come_from_fields(
    code: int, codes: dict[int, int], written: dict[str, Any] | None, cause: Cause, ranks: tuple[int, ...]
) -> None:
    found = find_fault(code, codes, written)
    assert (found.cause, found.ranks) == (cause, ranks)
    assert found.message


@pytest.mark.parametrize(
    ("history", "retry", "expected"),
    [
        ([start(Cause.done, 0, 9)], False, 0),
        ([start(Cause.stop, 0, 9)], False, 3),
        ([start(Cause.configuration, 0, 9)], False, 2),
        ([start(Cause.corruption, 0, 9)], False, 5),
        ([start(Cause.unhealthy, 0, 9)], False, 4),
        ([start(Cause.unhealthy, 0, 9)], True, "again"),
        ([start(Cause.unhealthy, 0, 9), start(Cause.unhealthy, 9, 9)], True, 4),
        ([start(Cause.crash, 9, 9), start(Cause.unhealthy, 9, 9)], True, "again"),
        ([start(Cause.out_of_memory, 0, 0)], False, 1),
        ([start(Cause.out_of_memory, 0, 9)], False, "again"),
        ([start(Cause.crash, 0, 0)] * 2, False, "again"),
        ([start(Cause.crash, 0, 0)] * 3, False, 1),
        ([*[start(Cause.crash, 0, 0)] * 2, start(Cause.hang, 0, 1)], False, "again"),
        ([start(Cause.disk_full, 0, 1)], False, "again"),
    ],
)
def test_what_follows_a_cause(history: list[Start], retry: bool, expected: int | str) -> None:
    decision = decide(history, 2, 5.0, retry)
    assert (decision.code if isinstance(decision, End) else "again") == expected


def test_the_pause_doubles_and_progress_resets_it() -> None:
    failing = [start(Cause.crash, 0, 1), *[start(Cause.crash, 1, 1)] * 8, start(Cause.crash, 1, 2)]
    pauses = [decide(failing[: count + 1], 99, 2.0, False) for count in range(len(failing))]
    found = [decision.pause_seconds for decision in pauses if isinstance(decision, Again)]
    assert found == [0, 2, 4, 8, 16, 32, 64, 2 * MAX_PAUSE_FACTOR, 2 * MAX_PAUSE_FACTOR, 0]


HISTORIES = st.lists(
    st.tuples(st.sampled_from([cause for cause in Cause if cause != Cause.done]), st.integers(0, 3)), min_size=1
)


@given(HISTORIES, st.integers(1, 5), st.booleans())
def test_properties_of_a_decision(drawn: list[tuple[Cause, int]], restarts: int, retry: bool) -> None:
    """A wrong configuration, a stop and corrupt results end a run; faults alone never do while steps are made."""
    reached, history = 0, []
    for cause, more in drawn:
        history.append(start(cause, reached, reached + more))
        reached += more
    decision = decide(history, restarts, 1.0, retry)
    cause = drawn[-1][0]
    if cause in (Cause.configuration, Cause.stop, Cause.corruption):
        assert isinstance(decision, End) and decision.code == CODES[cause]
    elif cause != Cause.unhealthy and drawn[-1][1]:
        assert isinstance(decision, Again)
    if count_fruitless(history) > restarts:
        assert isinstance(decision, End)
    if isinstance(decision, End):
        assert decision.code == CODES.get(cause, 1)
