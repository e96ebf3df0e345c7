"""What follows a fault: tables, and properties of whole histories."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch.supervisor.causes import STRIKES, Cause, Fault
from launch.supervisor.decide import MAX_PAUSE_FACTOR, Again, End, Policy, Wait, count_fruitless, decide
from launch.supervisor.node_choice import Choice, Start, Strike, choose_nodes, struck

CODES = {
    Cause.done: 0,
    Cause.configuration: 2,
    Cause.stop: 3,
    Cause.straggler: 3,
    Cause.unhealthy: 4,
    Cause.corruption: 5,
}


def start(cause: Cause, before: int, step: int, base: int = 0, on: str = "a", blamed: str = "", at: float = 0) -> Start:
    fault = Fault(cause, CODES.get(cause, 1), "…", (), tuple(blamed))
    return Start(fault, before, step, base, tuple(on), at)


@pytest.mark.parametrize(
    ("history", "retry", "expected"),
    [
        ([start(Cause.done, 0, 9)], False, 0),
        ([start(Cause.stop, 0, 9)], False, 3),
        ([start(Cause.configuration, 0, 9)], False, 2),
        ([start(Cause.corruption, 0, 9, blamed="a")], False, 5),
        ([start(Cause.corruption, 0, 9)], False, 5),
        ([start(Cause.unhealthy, 0, 9)], False, 4),
        ([start(Cause.unhealthy, 0, 9)], True, "again"),
        ([start(Cause.crash, 9, 9), start(Cause.unhealthy, 9, 9)], True, "again"),
        ([start(Cause.out_of_memory, 0, 0)], False, 1),
        ([start(Cause.out_of_memory, 0, 9)], False, "again"),
        ([start(Cause.crash, 0, 0)] * 2, False, "again"),
        ([start(Cause.crash, 0, 0)] * 3, False, 1),
        ([*[start(Cause.crash, 0, 0)] * 2, start(Cause.hang, 0, 1)], False, "again"),
        ([start(Cause.disk_full, 0, 1)], False, "again"),
        ([start(Cause.straggler, 0, 1, blamed="a")], False, "again"),
        ([start(Cause.store_lost, 0, 1)], False, "again"),
    ],
)
def test_what_follows_a_cause(history: list[Start], retry: bool, expected: int | str) -> None:
    decision = decide(history, "a", Policy(2, 5.0, retry))
    assert (decision.code if isinstance(decision, End) else "again") == expected


def test_the_pause_doubles_and_progress_resets_it() -> None:
    failing = [start(Cause.crash, 0, 1), *[start(Cause.crash, 1, 1)] * 8, start(Cause.crash, 1, 2)]
    pauses = [decide(failing[: count + 1], "a", Policy(99, 2.0)) for count in range(len(failing))]
    found = [decision.pause_seconds for decision in pauses if isinstance(decision, Again)]
    assert found == [0, 2, 4, 8, 16, 32, 64, 2 * MAX_PAUSE_FACTOR, 2 * MAX_PAUSE_FACTOR, 0]
    full = decide([start(Cause.disk_full, 0, 9)], "a", Policy(99, 2.0))
    assert isinstance(full, Again) and full.pause_seconds == 2.0  # a full disk is waited for whatever was trained


def test_numbers_that_come_again_go_back_further() -> None:
    """From the newest checkpoint, then from the one before it, and so on; other faults in between do not count."""
    policy = Policy(9, 0.0, True, max_rollback_checkpoints=2)
    checkpoints = [20, 30, 40, 50]
    history = [start(Cause.unhealthy, 0, 56)]
    found = []
    for base in (50, 50, 40, 30):
        decision = decide(history, "a", policy, checkpoints=checkpoints)
        found.append(decision.before_step if isinstance(decision, Again) else "end")
        cause = Cause.crash if base == 50 and len(history) == 1 else Cause.unhealthy
        history.append(start(cause, 56, 56, base))
    assert found == [None, None, 50, 40]
    assert isinstance(decide(history, "a", policy, checkpoints=checkpoints), End)
    history.append(start(Cause.crash, 56, 60))
    history.append(start(Cause.unhealthy, 60, 70))
    decision = decide(history, "a", policy, checkpoints=checkpoints)
    assert isinstance(decision, Again) and decision.before_step is None


def test_no_earlier_checkpoint_is_the_end() -> None:
    history = [start(Cause.unhealthy, 0, 56), start(Cause.unhealthy, 56, 56, 50)]
    decision = decide(history, "a", Policy(9, 0.0, True), checkpoints=[50])
    assert isinstance(decision, End) and "checkpoint.keep" in decision.reason
    none = [start(Cause.unhealthy, 0, 1), start(Cause.unhealthy, 1, 1)]
    decision = decide(none, "a", Policy(9, 0.0, True))
    assert isinstance(decision, End) and decision.reason == "the same numbers came again, and there is no checkpoint"


@pytest.mark.parametrize(
    ("members", "counts", "history", "chosen", "spares"),
    [
        ("abc", (2,), [], "ab", "c"),
        ("abc", (2,), [start(Cause.crash, 0, 1, on="ab", blamed="a")], "ab", "c"),
        ("abc", (2,), [start(Cause.crash, 0, 1, on="bc", blamed="c")], "bc", "a"),
        ("abc", (2,), [start(Cause.straggler, 0, 1, on="ab", blamed="a")], "bc", ""),
        ("abc", (2,), [start(Cause.corruption, 0, 1, on="ab", blamed="a")], "bc", ""),
        ("ab", (2,), [start(Cause.straggler, 0, 1, on="ab", blamed="a")], "ab", ""),
        ("abc", (2,), [start(Cause.crash, 0, 1, on="ab", blamed="b")] * 2, "ac", ""),
        ("bc", (2,), [start(Cause.node_lost, 0, 1, on="ab", blamed="a")], "bc", ""),
        ("b", (2,), [start(Cause.node_lost, 0, 1, on="ab", blamed="a")], "", ""),
        ("b", (2, 1), [start(Cause.node_lost, 0, 1, on="ab", blamed="a")], "b", ""),
        ("ab", (2, 1), [start(Cause.node_lost, 0, 1, on="b", blamed="a")], "ab", ""),  # grows back
        ("bcd", (4, 2), [start(Cause.node_lost, 0, 1, on="abcd", blamed="a")], "bc", "d"),
        ("ab", (2,), [start(Cause.crash, 0, 1, on="ab", blamed="a")] * 2, "ab", ""),  # nothing to replace it
        ("ab", (2, 1), [start(Cause.crash, 0, 1, on="ab", blamed="a")] * 2, "b", ""),
        ("ab", (2, 1), [start(Cause.crash, 0, 1, on="ab", blamed="a", at=-99)] * 2, "ab", ""),  # long ago
    ],
)
def test_which_nodes_get_ranks(
    members: str, counts: tuple[int, ...], history: list[Start], chosen: str, spares: str
) -> None:
    choice = Choice(counts, max_strikes=2, window_seconds=50)
    assert choose_nodes(members, history, choice, now=1) == (tuple(chosen), tuple(spares))


def test_strikes_of_earlier_commands_count_but_do_not_bar() -> None:
    choice = Choice((1,), max_strikes=1, earlier=(Strike("a", 0.0),))
    assert choose_nodes("ab", [], choice, now=1) == (("b",), ())
    assert choose_nodes("a", [], choice, now=1) == (("a",), ())


def test_of_excluded_nodes_one_that_fails_every_time_comes_last() -> None:
    """Node c failed each of its starts before a step, a and b some time after one."""
    choice = Choice((2,), max_strikes=1)
    history = [start(Cause.crash, 0, 9, on="ab", blamed="b"), start(Cause.crash, 9, 15, on="ab", blamed="b")]
    history += [start(Cause.crash, 15, 19, on="ab", blamed="a"), start(Cause.crash, 19, 19, on="ac", blamed="c")]
    assert choose_nodes("abc", history, choice, now=1) == (("a", "b"), ())
    earlier = Choice(
        (2,), 1, earlier=(Strike("a", 1.0), Strike("b", 1.0), Strike("b", 1.0), Strike("c", 1.0, False, True))
    )
    assert choose_nodes("abc", [], earlier, now=1) == (("a", "b"), ())


def test_too_few_nodes_are_waited_for() -> None:
    lost = [start(Cause.node_lost, 0, 9, on="ab", blamed="a")]
    decision = decide(lost, "b", Policy(2, choice=Choice((2,))))
    assert isinstance(decision, Wait) and "1 of the 2 nodes" in decision.reason
    corrupt = [start(Cause.corruption, 0, 9, on="ab", blamed="a")]
    decision = decide(corrupt, "ab", Policy(2, choice=Choice((2,))))
    assert isinstance(decision, Wait) and decision.code == 5 and "a computes wrongly" in decision.reason


TRANSIENT = (
    Cause.crash,
    Cause.hang,
    Cause.straggler,
    Cause.node_lost,
    Cause.store_lost,
    Cause.disk_full,
    Cause.out_of_memory,
)


@settings(max_examples=200)
@given(
    st.integers(0, 2**32),
    st.integers(1, 4),
    st.integers(0, 2),
    st.booleans(),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
)
def test_properties_of_a_history(
    seed: int, wanted: int, spares: int, shrink: bool, restarts: int, max_strikes: int, retry: bool
) -> None:
    """A run of 12 steps on nodes that come, go, crash and err: it ends, by rule, and only sound nodes get ranks."""
    draw = random.Random(seed)
    names = "abcdef"[: wanted + spares]
    counts = tuple(range(wanted, 0, -1)) if shrink else (wanted,)
    policy = Policy(restarts, 1.0, retry, 1, Choice(counts, max_strikes, 40.0))
    history: list[Start] = []
    members, reached, now = names, 0, 0.0
    while True:
        decision = decide(history, members, policy, now, range(reached))
        now += draw.choice((1.0, 5.0))
        if isinstance(decision, Wait):
            members = names  # all come back
            decision = decide(history, members, policy, now, range(reached))
        if not isinstance(decision, Again):
            break
        check_nodes(decision, members, history, policy, now)
        cause = draw.choice([*TRANSIENT * 2, Cause.unhealthy, Cause.corruption, Cause.stop, Cause.configuration])
        step = reached + draw.choice((0, 0, 1, 2))
        if step >= 12:
            cause, step = Cause.done, 12
        blamed = draw.choice(decision.nodes) if cause in STRIKES else ""
        history.append(start(cause, reached, step, 0, "".join(decision.nodes), blamed, now))
        members = "".join(name for name in names if name != blamed or cause != Cause.node_lost)
        reached = step
        assert len(history) <= 13 * (restarts + 1), "does not end"
    if isinstance(decision, End):
        check_end(decision, history, policy)


def check_nodes(decision: Again, members: str, history: list[Start], policy: Policy, now: float) -> None:
    """As many as the layout takes, all there, none barred, none excluded while others are enough."""
    barred = {name for one in history if one.fault.cause == Cause.corruption for name in one.fault.nodes}
    assert len(decision.nodes) in policy.choice.counts and set(decision.nodes) <= set(members) - barred
    assert not set(decision.spares) & set(decision.nodes)
    _, excluded = struck(history, policy.choice, now)
    if set(decision.nodes) & excluded:
        assert len(set(members) - barred - excluded) < min(policy.choice.counts)


def check_end(decision: End, history: list[Start], policy: Policy) -> None:
    cause, fruitless = history[-1].fault.cause, count_fruitless(history)
    assert decision.code == CODES.get(cause, 1)
    if cause in TRANSIENT and cause != Cause.out_of_memory:
        assert fruitless > policy.restarts or len(history[-1].nodes) == 1, "ended while restarts were left"
