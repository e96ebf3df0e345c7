"""A rank's profiled step in a file for the report: compute by part of the model, communication, waits."""

# Times are seconds; an interval is (start, end)

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from longcat.ops.cross_entropy import AUTOGRAD_NAME
from parallel.watchdog.events import Event, SpanKind
from train.profiling.recorder import CommSpan, Slice

Interval = tuple[float, float]
BACKWARD = "autograd::engine::evaluate_function"
MERGE_GAP = 2e-4  # operators of one module with a shorter gap are drawn as one slice
MAX_NESTED = 40  # spans that are searched for the one around a time


@dataclass(frozen=True)
class Operator:
    """An operator on the main thread, none inside another, or a kernel on the compute stream."""

    name: str
    start: float
    end: float
    sequence: int | None  # autograd's number of a forward operator, which its backward has too


class EventLookup:
    """Finds the innermost slice around a time."""

    def __init__(self, slices: list[Slice]) -> None:
        self.slices = sorted(slices, key=lambda one: one.start)
        self.starts = [one.start for one in self.slices]

    def at(self, time: float) -> Event | None:
        last = bisect_right(self.starts, time) - 1
        for number in range(last, max(-1, last - MAX_NESTED + 1), -1):
            if self.slices[number].end > time:
                return self.slices[number].event
        return None


def compute_slices(
    operators: list[Operator], inner: list[Operator], modules: list[Slice], phases: list[Slice]
) -> list[Slice]:
    """Slices in which this rank computes, each with the part of the model that it belongs to.

    Args:
        operators: the outermost ones, in order of time.
        inner: all operators, to find the module that a backward belongs to by autograd's sequence number.
        modules: the modules' forwards.
        phases: of the step.
    """
    module_at, phase_at = EventLookup(modules).at, EventLookup(phases).at
    by_sequence = {}
    for one in inner:
        event = module_at(one.start)
        if one.sequence is not None and event is not None and not one.name.startswith(BACKWARD):
            by_sequence[one.sequence] = event  # an operator without a gradient has the number of the next one
    slices: list[Slice] = []
    for one in operators:
        event = module_at(one.start)
        if event is None and one.sequence is not None and one.name.startswith(BACKWARD):
            event = by_sequence.get(one.sequence)
        event = event or Event(_kind_by_operator(one.name) or _kind_by_phase(phase_at(one.start)))
        if slices and slices[-1].event == event and one.start - slices[-1].end < MERGE_GAP:
            slices[-1].end = max(slices[-1].end, one.end)
        else:
            slices.append(Slice(event, one.start, one.end))
    return slices


def _kind_by_operator(name: str) -> SpanKind | None:
    """The part that an operator of torch's belongs to, for those outside the modules' forwards."""
    if AUTOGRAD_NAME in name:
        return SpanKind.HEAD
    return SpanKind.SHARDING if name.startswith("fsdp::") or "RegisterPostBackward" in name else None


def _kind_by_phase(phase: Event | None) -> SpanKind:
    """A queue computes deferred weight gradients outside autograd."""
    named = (SpanKind.WEIGHT_GRADIENTS, SpanKind.OPTIMIZER)
    return phase.kind if phase is not None and phase.kind in named else SpanKind.OTHER


def subtract(slices: list[Slice], gaps: list[Interval]) -> list[Slice]:
    """The slices minus the gaps; gaps are in order of time and do not overlap."""
    left = []
    ends = [gap[1] for gap in gaps]
    for one in slices:
        start = one.start
        for gap in gaps[bisect_right(ends, start) :]:
            if gap[0] >= one.end:
                break
            if gap[0] > start:
                left.append(Slice(one.event, start, gap[0]))
            start = max(start, gap[1])
        if start < one.end:
            left.append(Slice(one.event, start, one.end))
    return left


def outermost(operators: list[Operator]) -> list[Operator]:
    """The operators that no other operator contains, in order of time."""
    found: list[Operator] = []
    for one in sorted(operators, key=lambda operator: (operator.start, -operator.end)):
        if not found or one.start >= found[-1].end:
            found.append(one)
    return found


def timeline(
    rank: int, compute: list[Slice], phases: list[Slice], comm_spans: list[CommSpan], step: Interval, origin: float
) -> dict[str, Any]:
    """A rank's part of `traces/timeline-….json`: events as their fields, times in microseconds after ``origin``."""

    def at(time: float) -> float:
        return round(1e6 * (time - origin), 1)

    def row(one: Slice) -> dict[str, Any]:
        return {**one.event.fields(), "start": at(one.start), "end": at(one.end)}

    blocked = sorted(one.blocked for one in comm_spans if one.blocked is not None)
    exposed = sum(end - start for start, end in blocked)
    return {
        "rank": rank,
        "start": at(step[0]),
        "end": at(step[1]),
        "exposed_share": exposed / (step[1] - step[0]),
        "exposed_seconds": exposed,
        "compute": [row(one) for one in subtract(compute, blocked)],
        "actions": [row(one) for one in phases if one.event.action is not None],
        "communication": [
            {
                **one.event.fields(),
                "track": one.track,
                "phase": None if one.phase is None else one.phase.fields(),
                "start": at(one.start),
                "end": at(one.end if one.end is not None else one.start),
                "bytes": one.num_bytes,
                "blocked": None if one.blocked is None else [at(time) for time in one.blocked],
            }
            for one in sorted(comm_spans, key=lambda one: one.start)
        ],
    }
