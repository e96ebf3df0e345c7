"""What happened in a profiled step: compute, and communication with the part that no compute overlapped."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any, NamedTuple

from parallel.watchdog.events import Event, Track
from parallel.watchdog.spans import SPANS, WAITING, Span

# Times are seconds of `time.monotonic`


@dataclass
class Slice:
    """Work of this rank."""

    event: Event
    start: float
    end: float


@dataclass
class CommSpan:
    """A collective or transfer from its launch to its completion, and the wait for it."""

    event: Event
    phase: Event | None  # in which it was launched: `backward of micro-batch 2`
    start: float
    end: float | None = None  # None until it is known
    num_bytes: int = 0  # that left this rank; 0 where they are not counted
    blocked: tuple[float, float] | None = None  # this rank waited from, to

    @property
    def track(self) -> Track:
        return self.event.kind.track

    def close(self, last: float) -> None:
        """Set the end. Where the completion was not observed, it is the end of the wait."""
        if self.end is None:
            self.end = last if self.blocked is None else self.blocked[1]
        if self.blocked is not None and self.blocked[0] < self.end:
            self.end = max(self.end, self.blocked[1])  # this rank learns of the completion when its wait ends
        self.end = max(self.end, self.start)

    @property
    def exposed(self) -> float:
        """Seconds that this rank waited for it."""
        return 0.0 if self.blocked is None else self.blocked[1] - self.blocked[0]


class Send(NamedTuple):
    """A message that left this rank."""

    time: float
    event: Event
    num_bytes: int
    peer: int


class StepRecorder:
    """Keeps what spans report from `start` to `finish`. A thread of the backend reports when a collective completes."""

    def __init__(self) -> None:
        self.phases: list[Slice] = []  # work spans
        self.modules: list[Slice] = []  # forwards of the model's modules
        self.comm_spans: list[CommSpan] = []
        self.sends: list[Send] = []
        self._in_flight: dict[Event, deque[CommSpan]] = {}  # collectives of equal events are waited for in order

    def start(self) -> None:
        SPANS.recorder = self

    def finish(self) -> None:
        """Stop, and set the ends that are not known."""
        SPANS.recorder = None
        now = monotonic()
        for comm_span in self.comm_spans:
            comm_span.close(now)

    def span_ended(self, span: Span, now: float) -> None:
        if span.state is not WAITING:
            self.phases.append(Slice(span.event, span.entered, now))
        elif SPANS.outermost_wait is span:
            in_flight = self._in_flight.get(span.event)
            if in_flight:
                comm_span = in_flight.popleft()
            else:  # one call launches it and waits for it
                comm_span = self._begin(span.event, span.outer, span.entered)
                comm_span.end = now
            comm_span.blocked = (span.entered, now)

    def launched(self, event: Event, num_bytes: int, work: Any) -> None:
        comm_span = self._begin(event, SPANS.innermost, monotonic())
        comm_span.num_bytes = num_bytes
        self._in_flight.setdefault(event, deque()).append(comm_span)

        def complete(_: Any) -> None:
            comm_span.end = monotonic()

        # On a GPU the future completes when the collective is queued: there its wait is its end
        if work is not None and SPANS.stream_clock is None:
            with suppress(RuntimeError):  # some collectives have no future
                work.get_future().add_done_callback(complete)

    def sent(self, event: Event, num_bytes: int, peer: int) -> None:
        self.sends.append(Send(monotonic(), event, num_bytes, peer))

    def module(self, event: Event, start: float, end: float) -> None:
        """A module of the model has computed its forward."""
        self.modules.append(Slice(event, start, end))

    def _begin(self, event: Event, outer: Span | None, start: float) -> CommSpan:
        while outer is not None and outer.state is WAITING:
            outer = outer.outer
        comm_span = CommSpan(event, None if outer is None else outer.event, start)
        self.comm_spans.append(comm_span)
        return comm_span
