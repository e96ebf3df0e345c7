"""What a rank did in a profiled step, small enough for a picture: computing by part of the model, exchanges, waits."""

# Times are in seconds; an interval is (start, end)

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from train.profiling.recorder import CommSpan, Slice

Interval = tuple[float, float]
BACKWARD = "autograd::engine::evaluate_function"
SAME_WORK = 2e-4  # operators of one part that lie no further apart are drawn as one piece


@dataclass(frozen=True)
class Operator:
    """An operator on the main thread, none inside another, or a kernel on the compute stream."""

    name: str
    start: float
    end: float
    sequence: int | None  # the number that autograd gives a forward operator, and its backward again


class Names:
    """Finds the part of the model that computes at a time: the innermost span around it."""

    def __init__(self, spans: list[Slice]) -> None:
        self.spans = sorted(spans, key=lambda span: span.start)
        self.starts = [span.start for span in self.spans]

    def at(self, time: float) -> str | None:
        for place in range(bisect_right(self.starts, time) - 1, max(-1, bisect_right(self.starts, time) - 40), -1):
            if self.spans[place].end > time:
                return self.spans[place].name
        return None


def compute_pieces(operators: list[Operator], inner: list[Operator], spans: list[Slice]) -> list[Slice]:
    """Busy stretches of this rank, each named by the part of the model that it is for.

    Args:
        operators: the outermost ones, in order of time.
        inner: all that have a sequence number, to find the part that a backward belongs to.
        spans: of the parts' forwards and of phases.
    """
    phases = Names([span for span in spans if _is_phase(span.name)])
    parts = Names([span for span in spans if not _is_phase(span.name)])
    by_number = {}
    for one in inner:
        name = parts.at(one.start)
        if one.sequence is not None and name is not None and not one.name.startswith(BACKWARD):
            by_number[one.sequence] = name  # an operator without a gradient has the number that the next one will use
    pieces: list[Slice] = []
    for one in operators:
        name = parts.at(one.start)
        if name is None and one.sequence is not None and one.name.startswith(BACKWARD):
            name = by_number.get(one.sequence)
        name = name or _by_operator(one.name) or _by_phase(phases.at(one.start) or "")
        if pieces and pieces[-1].name == name and one.start - pieces[-1].end < SAME_WORK:
            pieces[-1].end = max(pieces[-1].end, one.end)
        else:
            pieces.append(Slice("compute", name, one.start, one.end))
    return pieces


def _by_operator(name: str) -> str | None:
    """For what no module's forward holds."""
    if "LinearCrossEntropy" in name:
        return "head and loss"
    return "sharding" if name.startswith("fsdp::") or "RegisterPostBackward" in name else None


def _by_phase(phase: str) -> str:
    if phase.startswith("weight gradients"):
        return "weight gradients"  # a queue computes them late, outside autograd
    return "optimizer" if phase == "optimizer" else "other"


def _is_phase(name: str) -> bool:
    return " of micro-batch " in name or name in ("optimizer", "norm and numbers")


def without(pieces: list[Slice], holes: list[Interval]) -> list[Slice]:
    """The pieces less the holes; holes are in order of time and do not overlap."""
    left = []
    ends = [hole[1] for hole in holes]
    for piece in pieces:
        start = piece.start
        for hole in holes[bisect_right(ends, start) :]:
            if hole[0] >= piece.end:
                break
            if hole[0] > start:
                left.append(Slice(piece.lane, piece.name, start, hole[0]))
            start = max(start, hole[1])
        if start < piece.end:
            left.append(Slice(piece.lane, piece.name, start, piece.end))
    return left


def outermost(operators: list[Operator]) -> list[Operator]:
    """Those that lie in no other one, in order of time."""
    found: list[Operator] = []
    for one in sorted(operators, key=lambda operator: (operator.start, -operator.end)):
        if not found or one.start >= found[-1].end:
            found.append(one)
    return found


def timeline(
    rank: int, pieces: list[Slice], actions: list[Slice], journeys: list[CommSpan], step: Interval, origin: float
) -> dict[str, Any]:
    """As it lies in `traces/timeline-….json`: times in microseconds after ``origin``."""

    def at(time: float) -> float:
        return round(1e6 * (time - origin), 1)

    blocked = sorted(journey.blocked for journey in journeys if journey.blocked is not None)
    exposed = sum(end - start for start, end in blocked)
    return {
        "rank": rank,
        "start": at(step[0]),
        "end": at(step[1]),
        "exposed_share": exposed / (step[1] - step[0]),
        "exposed_seconds": exposed,
        "compute": [[piece.name, at(piece.start), at(piece.end)] for piece in without(pieces, blocked)],
        "actions": [[action.name, at(action.start), at(action.end)] for action in actions],
        "exchanges": [
            {
                "lane": journey.lane,
                "name": journey.name,
                "around": journey.around,
                "start": at(journey.start),
                "end": at(journey.end if journey.end is not None else journey.start),
                "bytes": journey.num_bytes,
                "blocked": None if journey.blocked is None else [at(time) for time in journey.blocked],
            }
            for journey in sorted(journeys, key=lambda journey: journey.start)
        ],
    }
