"""What follows the end of the ranks: another start after a pause, or the end of the run. A pure function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.supervisor.causes import ADVICE, Cause, Fault

MAX_PAUSE_FACTOR = 32  # the longest pause before a start, in `launch.backoff_seconds`


@dataclass(frozen=True)
class Start:
    """How one start of all ranks went."""

    fault: Fault
    before: int  # newest step that the run had reached before it
    step: int  # newest step that the run has reached at its end


@dataclass(frozen=True)
class Again:
    """Start all ranks again after a pause."""

    pause_seconds: float
    reason: str


@dataclass(frozen=True)
class End:
    """The run ends with this exit code."""

    code: int
    reason: str


def decide(history: Sequence[Start], restarts: int, backoff_seconds: float, retry_unhealthy: bool) -> Again | End:
    """What follows the last start of ``history``.

    Args:
        restarts: starts in a row, after the first, that may bring no new step.
        backoff_seconds: pause after the first start without a new step; it doubles with each further one.
        retry_unhealthy: whether non-finite numbers get a second try from the last checkpoint.
    """
    fault, fruitless = history[-1].fault, count_fruitless(history)
    advice = ADVICE.get(fault.cause, "")
    if fault.cause in (Cause.done, Cause.stop):
        return End(fault.code, "")
    if fault.cause == Cause.configuration:
        return End(fault.code, advice)
    if fault.cause == Cause.corruption:
        return End(fault.code, advice)  # every rank is on the machine that computes wrongly
    if fault.cause == Cause.unhealthy and not retry_unhealthy:
        return End(fault.code, advice)
    if fault.cause == Cause.unhealthy and fruitless and len(history) > 1 and history[-2].fault.cause == Cause.unhealthy:
        return End(fault.code, f"the same numbers came again from the last checkpoint; {advice}")
    if fault.cause == Cause.out_of_memory and fruitless:
        return End(fault.code, advice)
    if fruitless > restarts:
        return End(fault.code, f"{fruitless} starts in a row brought no new step; {advice}")
    pause = 0.0 if not fruitless else backoff_seconds * min(2 ** (fruitless - 1), MAX_PAUSE_FACTOR)
    return Again(pause, f"{fault.cause}; starts in a row without a new step: {fruitless} (launch.restarts={restarts})")


def count_fruitless(history: Sequence[Start]) -> int:
    """Starts at the end of the history that took the run no further than it had been."""
    count = 0
    for start in history:
        count = 0 if start.step > start.before else count + 1
    return count
