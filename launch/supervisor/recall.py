"""What an earlier first node or command noted of the run's starts in launch.jsonl, for whoever decides after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from launch.supervisor.causes import Cause, Fault
from launch.supervisor.ledger import Life
from launch.supervisor.nodes import Start
from longcat.errors import CRASHED


@dataclass(frozen=True)
class Earlier:
    """The decisions that this node goes on from."""

    first_node: str  # who made the last one


@dataclass(frozen=True)
class Leader:
    """The first node of several, which decides."""

    claim: int  # number of its claim on the run (`launch.claims`)
    check: Callable[[], None]  # raises ConnectionError once another node has become the first one
    earlier: Earlier | None = None


KILLED = Fault(Cause.supervisor_lost, CRASHED, "longcat train itself was killed, or its machine failed")


def open_since(journal: Sequence[dict[str, Any]]) -> float | None:
    """When the first start was made of a run that has noted no totals, which is how each run ends; None without one."""
    since: float | None = None
    for line in journal:
        if line.get("event") == "totals":
            since = None
        elif line.get("event") == "start" and since is None:
            since = float(line["time"])
    return since


def starts_of(journal: Sequence[dict[str, Any]], since: float) -> list[dict[str, Any]]:
    """The starts since ``since``, without what a first node noted after the first line of the one that replaced it."""
    found, newest = [], 0
    for line in journal:
        if line.get("event") == "start" and float(line["time"]) >= since and int(line["claim"]) >= newest:
            found.append(line)
            newest = int(line["claim"])
    return found


def recall(
    journal: Sequence[dict[str, Any]], since: float, unfinished: Fault, now: float, rows: Sequence[dict[str, Any]]
) -> tuple[list[Start], list[Life]]:
    """Starts and lives since ``since``, in order.

    Args:
        journal: lines of launch.jsonl.
        unfinished: what ended a start that has no end in the journal: whoever was to note it is lost.
        now: when metrics.jsonl was last written, which is its end if it came to write there.
        rows: lines of metrics.jsonl, from which its steps follow.
    """
    history: list[Start] = []
    lives: list[Life] = []
    ends: dict[tuple[int, int], dict[str, Any]] = {}
    for line in journal:
        if line.get("event") == "end" and float(line["time"]) >= since:
            ends.setdefault((int(line["claim"]), int(line["incarnation"])), line)
    starts = starts_of(journal, since)
    for index, line in enumerate(starts):
        end = ends.get((int(line["claim"]), int(line["incarnation"])))
        following = starts[index + 1] if index + 1 < len(starts) else None
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
        until = max(begin, float(following["time"]) if following is not None else now)
        base = int(line["newest"])
        finished = steps_of(rows, base, begin, until) if following is None and now > begin else ()
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
