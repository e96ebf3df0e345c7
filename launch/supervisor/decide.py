"""What follows the end of the ranks: another start after a pause, or the end of the run. A pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from launch.supervisor.causes import ADVICE, Cause
from launch.supervisor.node_choice import Choice, Start, choose_nodes, struck

MAX_PAUSE_FACTOR = 32  # the longest pause before a start, in `launch.backoff_seconds`


@dataclass(frozen=True)
class Policy:
    """The keys of `launch` that decide."""

    restarts: int  # starts in a row, after the first, that may bring no new step
    backoff_seconds: float = 5.0  # pause after the first start without a new step; it doubles with each further one
    retries_unhealthy: bool = False  # numbers that are not finite get a second try from the last checkpoint
    max_rollback_checkpoints: int = 1  # further tries from checkpoints before that
    choice: Choice = field(default_factory=Choice)


@dataclass(frozen=True)
class Again:
    """Start all ranks after a pause."""

    pause_seconds: float
    reason: str
    nodes: tuple[str, ...] = ()  # that get ranks
    spares: tuple[str, ...] = ()  # that stand by
    before_step: int | None = None  # from the newest valid checkpoint of a step below this; None: the newest of all


@dataclass(frozen=True)
class Wait:
    """Too few nodes can be used; the run ends with this code if none comes."""

    code: int
    reason: str
    advice: str  # what a person can do


@dataclass(frozen=True)
class End:
    """The run ends with this exit code."""

    code: int
    reason: str  # why it is not started again, where that is not plain from the fault
    advice: str = ""  # what a person can do
    too_few_nodes: bool = False  # none came in time


def decide(
    history: Sequence[Start],
    members: Sequence[str],
    policy: Policy,
    now: float = 0.0,
    checkpoints: Sequence[int] = (),
    earlier: Sequence[Start] = (),
) -> Again | Wait | End:
    """What follows the last start of ``history``; before the first one, on which nodes it runs.

    Args:
        members: nodes that are there, in the order of nodes.
        now: seconds since 1970.
        checkpoints: steps of the run's checkpoints.
        earlier: starts of commands before this one of a run that has not ended: how often numbers that are not finite
            came again is counted from them on, and nothing else follows from them.
    """
    nodes, spares = choose_nodes(members, history, policy.choice, now)
    if not history:
        return Again(0.0, "", nodes, spares) if nodes else _too_few(1, members, history, policy, now)
    fault, fruitless = history[-1].fault, count_fruitless(history)
    advice, before_step = ADVICE.get(fault.cause, ""), None
    if fault.cause in (Cause.done, Cause.stop, Cause.configuration):
        return End(fault.code, "", advice)
    if fault.cause == Cause.corruption and not fault.nodes:
        return End(fault.code, "no rank is named, so that no node can be left out", advice)
    if fault.cause == Cause.unhealthy:
        tries = unhealthy_tries([*earlier, *history])
        if not policy.retries_unhealthy:
            return End(fault.code, "launch.on_unhealthy=stop", advice)
        if len(tries) > policy.max_rollback_checkpoints:
            return End(fault.code, f"the same numbers came again from {_checkpoints(len(tries))}", advice)
        before_step = min((start.base for start in tries), default=None)
        if before_step is not None and not any(step < before_step for step in checkpoints):
            reason = f"the same numbers came again from {_checkpoints(len(tries))}, and no earlier one is kept "
            reason += "(checkpoint.keep)"
            if not checkpoints:
                reason = "the same numbers came again, and there is no checkpoint"
            return End(fault.code, reason, advice)
    if fault.cause == Cause.out_of_memory and fruitless:
        return End(fault.code, "a start without a new step ran out of memory", advice)
    if fruitless > policy.restarts:
        reason = f"{fruitless} starts in a row brought no new step (launch.restarts={policy.restarts})"
        return End(fault.code, reason, advice)
    if not nodes:
        if len(members) <= 1 == policy.choice.counts[0]:
            return End(fault.code, "every rank is on the machine that computes wrongly", advice)
        return _too_few(fault.code, members, history, policy, now)
    waits = fruitless or fault.cause == Cause.disk_full  # a disk is no emptier at once, whatever was trained before
    pause = policy.backoff_seconds * min(2 ** max(fruitless - 1, 0), MAX_PAUSE_FACTOR) if waits else 0.0
    reason = f"{fruitless} of launch.restarts={policy.restarts} in a row without a new step" if fruitless else ""
    return Again(pause, reason, nodes, spares, before_step)


def count_fruitless(history: Sequence[Start]) -> int:
    """Starts at the end of the history that took the run no further than it had been."""
    count = 0
    for start in history:
        count = 0 if start.step > start.before else count + 1
    return count


def unhealthy_tries(history: Sequence[Start]) -> list[Start]:
    """Starts that were to get past numbers that are not finite, and found them again without a new step."""
    first = reached = 0  # index of the last start that brought a new step; newest step of all
    for index, start in enumerate(history):
        reached = max(reached, start.before)  # a new command finds no steps in metrics.jsonl that were taken back
        if start.step > reached:
            first, reached = index, start.step
    return [start for start in history[first:] if start.fault.cause == Cause.unhealthy][1:]


def _checkpoints(count: int) -> str:
    return "the last checkpoint" if count == 1 else f"each of the last {count} checkpoints"


def _too_few(code: int, members: Sequence[str], history: Sequence[Start], policy: Policy, now: float) -> Wait:
    barred, _ = struck(history, policy.choice, now)
    out, counts = sorted(barred.intersection(members)), policy.choice.counts
    reason = f"{len(members) - len(out)} of the {counts[0]} nodes that the run needs can be used"
    if out:
        reason += f" ({', '.join(out)} compute{'s' * (len(out) == 1)} wrongly)"
    smaller = "" if len(counts) > 1 else ", or allow fewer with launch.shrink=true"
    return Wait(code, reason, f"start longcat train on another node{smaller}")
