"""The history of a run's starts in launch.jsonl, read by a command or a first node that takes over."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.supervisor.causes import Cause, Fault
from launch.supervisor.journal import read_lines
from launch.supervisor.ledger import Life, after
from launch.supervisor.node_choice import Start
from longcat.errors import CRASHED
from train.loggers.jsonl import rows
from train.run_dir.files import Note

Line = dict[str, Any]  # of launch.jsonl or metrics.jsonl


@dataclass(frozen=True)
class Earlier:
    """The decisions of the same command that this node goes on from."""

    first_node: str  # who made the last one


@dataclass(frozen=True)
class Leader:
    """The first node of several, which decides."""

    claim: int  # number of its claim on the run (`launch.nodes.claims`)
    check: Callable[[], None]  # raises ConnectionError once another node has become the first one
    command: str  # identifies what was started on all nodes, in each line of launch.jsonl
    earlier: Earlier | None = None


@dataclass(frozen=True)
class Unfinished:
    """A start without an end in launch.jsonl: whoever was to note it is lost."""

    line: Line  # of the start
    start: Start
    life: Life


@dataclass
class Recalled:
    """The starts of a run that has not ended, in order."""

    earlier: list[Start] = field(default_factory=list)  # of commands before this one
    own: list[Start] = field(default_factory=list)  # of this command
    lives: list[Life] = field(default_factory=list)  # of both
    unfinished: list[Unfinished] = field(default_factory=list)


KILLED = Fault(Cause.supervisor_lost, CRASHED, "longcat train itself was killed, or its machine failed")


def recall(path: Path, command: str, lost: Fault, metrics: Path, note: Note) -> Recalled:
    """`read_starts` of the journal at ``path``; nothing, with a note, where its lines are not those of this version."""
    try:
        return read_starts(read_lines(path, note), command, lost, metrics)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        note(f"{path} has a line that is not understood ({error!r}); the ledger of wall time begins anew")
        return Recalled()


def read_starts(journal: Sequence[Line], command: str, lost: Fault, metrics: Path) -> Recalled:
    """The starts since the last totals, which a command notes unless it is killed or loses the other nodes.

    Clocks of machines may differ: no start begins before the end of the one before it.

    Args:
        journal: lines of launch.jsonl.
        command: the one that recalls.
        lost: what ended a start of this command that has no end; an earlier command was killed.
        metrics: metrics.jsonl, from which the steps of the last start follow where that has no end.

    Raises:
        KeyError, TypeError, ValueError, OverflowError: a line does not say what lines of this version say.
    """
    found, end = Recalled(), -math.inf
    starts = starts_of(journal)
    starts.sort(key=lambda pair: pair[0].get("command") == command)  # stable: this command's come last
    for index, (line, ended) in enumerate(starts):
        is_own = line.get("command") == command
        if ended is not None:
            start, life = _finished(line, ended)
        else:
            following = starts[index + 1][0] if index + 1 < len(starts) else None
            start, life = _unfinished(line, lost if is_own else KILLED, following, metrics)
        life = after(end, life)
        end = life.end
        (found.own if is_own else found.earlier).append(start)
        found.lives.append(life)
        if ended is None:
            found.unfinished.append(Unfinished(line, start, life))
    return found


def starts_of(journal: Sequence[Line]) -> list[tuple[Line, Line | None]]:
    """The starts since the last totals, each with its end.

    What a first node noted after the first line of the one that replaced it is left out.
    """
    found: list[tuple[Line, Line | None]] = []
    places: dict[tuple[str | None, int, int], int] = {}  # of starts without an end so far
    newest: dict[str | None, int] = {}  # command → claim
    totals = [index for index, line in enumerate(journal) if line.get("event") == "totals"]
    for line in journal[totals[-1] + 1 if totals else 0 :]:
        event, command = line.get("event"), line.get("command")
        if event not in ("start", "end"):
            continue
        claim = int(line.get("claim", 0))
        key = (command, claim, int(line["incarnation"]))
        if event == "end" and key in places:
            place = places.pop(key)
            found[place] = (found[place][0], line)
        elif event == "start" and claim >= newest.get(command, 0):
            newest[command], places[key] = claim, len(found)
            found.append((line, None))
    return found


def _finished(line: Line, ended: Line) -> tuple[Start, Life]:
    """A start whose end was noted."""
    cause, time = Cause(ended["cause"]), seconds(ended["time"])
    fault = Fault(cause, int(ended["code"]), str(ended["message"]), tuple(ended["ranks"]), tuple(ended["nodes"]))
    base, best = int(ended["base"]), int(ended["best"])
    steps = tuple((int(step), seconds(when)) for step, when in ended["finished"])
    blocked, is_fault = seconds(ended["blocked_seconds"]), cause not in (Cause.done, Cause.stop)
    life = Life(seconds(line["time"]), time, steps, base, int(ended["kept"]), blocked, int(ended["saves"]), is_fault)
    return Start(fault, int(line["before"]), best, base, tuple(line["on"]), time), life


def _unfinished(line: Line, fault: Fault, following: Line | None, metrics: Path) -> tuple[Start, Life]:
    """A start without an end: it ended when the last line of metrics was written, or the command's next start began."""
    begin, base, before = seconds(line["time"]), int(line["newest"]), int(line["before"])
    end, steps = begin, tuple[tuple[int, float], ...]()
    if following is None:
        with suppress(OSError):
            end = max(begin, metrics.stat().st_mtime)
        if end > begin:
            with suppress(OSError):
                steps = steps_of(list(rows(metrics)), base, begin, end)
    elif following.get("command") == line.get("command"):
        end = max(begin, seconds(following["time"]))
    best = max([before, *(step for step, _ in steps)])
    life = Life(begin, end, steps, base, base, 0.0, 0, True)
    return Start(fault, before, best, base, tuple(line["on"]), end), life


def seconds(value: Any) -> float:
    """A finite number.

    Raises:
        ValueError, TypeError: it is none.
    """
    found = float(value)
    if not math.isfinite(found):
        raise ValueError(f"{value} is no number of seconds")
    return found


def steps_of(rows: Sequence[Line], base: int, begin: float, end: float) -> tuple[tuple[int, float], ...]:
    """(step, time) of the steps after ``base``, from the seconds that each took, the last at ``end``."""
    found, when = [], end
    for row in reversed(rows):
        step, took = row.get("step"), row.get("step_seconds")
        if not isinstance(step, int):
            continue
        if step <= base:
            break
        found.append((step, max(when, begin)))
        when -= took if isinstance(took, int | float) and took > 0 else 0.0
    return tuple(reversed(found))


def lost_first_node(earlier: Earlier | None, members: Sequence[str]) -> Fault:
    """What ended the start whose end nobody noted: the first node, or its store where that node is still there."""
    if earlier is None:
        return KILLED
    if earlier.first_node in members:
        return Fault(Cause.store_lost, CRASHED, "the store that connects the nodes is lost")
    message = f"the first node, {earlier.first_node}, sent no heartbeat (launch.node_timeout)"
    return Fault(Cause.node_lost, CRASHED, message, (), (earlier.first_node,))


def thinned(finished: Sequence[tuple[int, float]], checkpoints: Sequence[int]) -> list[tuple[int, float]]:
    """The finished steps that the ledger can ask for: the first, the last and those of checkpoints."""
    ends = {finished[0][0], finished[-1][0], *checkpoints} if finished else set()
    return [each for each in finished if each[0] in ends]
