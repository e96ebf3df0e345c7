"""What an earlier first node noted of the run's starts in launch.jsonl, for the node that decides after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from launch.supervisor.causes import Cause, Fault
from launch.supervisor.ledger import Life
from launch.supervisor.nodes import Start
from longcat.errors import CRASHED


@dataclass(frozen=True)
class Earlier:
    """The decisions that this node goes on from."""

    since: float  # when the first of them was made; seconds since 1970
    first_node: str  # who made the last one


def recall(
    journal: Sequence[dict[str, Any]], since: float, unfinished: Fault, now: float, rows: Sequence[dict[str, Any]]
) -> tuple[list[Start], list[Life]]:
    """Starts and lives since ``since``, in order.

    Args:
        journal: lines of launch.jsonl.
        unfinished: what ended a start that has no end in the journal: whoever was to note it is lost.
        now: its end.
        rows: lines of metrics.jsonl, from which its steps follow.
    """
    history: list[Start] = []
    lives: list[Life] = []
    lines = [line for line in journal if line.get("event") in ("start", "end") and float(line["time"]) >= since]
    for index, line in enumerate(lines):
        if line["event"] != "start":
            continue
        following = lines[index + 1] if index + 1 < len(lines) else None
        end = following if following is not None and following["event"] == "end" else None
        on, begin, before = tuple(line["on"]), float(line["time"]), int(line["before"])
        if end is not None:
            cause, code, message = Cause(end["cause"]), int(end["code"]), str(end["message"])
            fault = Fault(cause, code, message, tuple(end["ranks"]), tuple(end["nodes"]))
            history.append(Start(fault, before, int(end["best"]), int(end["base"]), on, float(end["time"])))
            finished = tuple((int(step), float(when)) for step, when in end["finished"])
            kept, blocked, saves = int(end["kept"]), float(end["blocked_seconds"]), int(end["saves"])
            is_fault = cause not in (Cause.done, Cause.stop)
            lives.append(Life(begin, float(end["time"]), finished, int(end["base"]), kept, blocked, saves, is_fault))
            continue
        until = float(following["time"]) if following is not None else now
        base = int(line["newest"])
        finished = steps_of(rows, base, begin, until) if following is None else ()
        best = max([before, *(step for step, _ in finished)])
        history.append(Start(unfinished, before, best, base, on, until))
        lives.append(Life(begin, until, finished, base, base, 0.0, 0, True))
    return history, lives


def steps_of(rows: Sequence[dict[str, Any]], base: int, begin: float, end: float) -> tuple[tuple[int, float], ...]:
    """(step, time) of the steps after ``base``, from the seconds that each took, the last at ``end``."""
    found, when = [], end
    for row in reversed(rows):
        if int(row["step"]) <= base:
            break
        found.append((int(row["step"]), max(when, begin)))
        when -= float(row.get("step_seconds", 0.0))
    return tuple(reversed(found))


def lost_first_node(earlier: Earlier, members: Sequence[str]) -> Fault:
    """What ended the start whose end nobody noted: the first node, or its store where that node is still there."""
    if earlier.first_node in members:
        return Fault(Cause.store_lost, CRASHED, "the store that connects the nodes is lost")
    message = f"the first node, {earlier.first_node}, gave no sign of life (launch.node_timeout)"
    return Fault(Cause.node_lost, CRASHED, message, (), (earlier.first_node,))


def thinned(finished: Sequence[tuple[int, float]], checkpoints: Sequence[int]) -> list[tuple[int, float]]:
    """The finished steps that the ledger can ask for: the first, the last and those of checkpoints."""
    ends = {finished[0][0], finished[-1][0], *checkpoints} if finished else set()
    return [each for each in finished if each[0] in ends]
