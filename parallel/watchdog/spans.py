"""Spans: what this rank does now. They are so cheap that every collective has one.

Spans also measure a step's blocked seconds, and tell a `Recorder` what happens while a step is profiled.

`python -m benchmarks.spans` measures the cost of a span. There is no lock: each change is one assignment, so the
watchdog's threads read a state that is at most one change old.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from time import monotonic
from typing import Any, NamedTuple, Protocol

import torch.distributed as dist

from parallel.watchdog.events import Event, RankState, SpanKind
from parallel.watchdog.wait_graph import encode_ranks

WAITING, WORKING = RankState.WAITING, RankState.WORKING
Group = dist.ProcessGroup | Iterable[int] | None  # the ranks of a collective; None is all


class Recorder(Protocol):
    """Is told what happens while a step is profiled; times are seconds of `time.monotonic`."""

    def span_ended(self, span: Span, now: float) -> None: ...

    def launched(self, event: Event, num_bytes: int, work: Any) -> None:
        """A collective has been launched; the span around its wait has the same event."""

    def sent(self, event: Event, num_bytes: int, peer: int) -> None:
        """A message to one rank has been sent."""


class StreamClock(Protocol):
    """Measures on the device how long its compute stream waits for other ranks, which no host clock sees."""

    def enter(self) -> None:
        """A wait begins."""

    def leave(self) -> None:
        """The host has passed the wait."""

    def take(self) -> float:
        """Seconds since the last call. Synchronizes with the device."""


class Progress(Protocol):
    """Counts what the host has issued for the device, by process group."""

    def issued(self, group: dist.ProcessGroup) -> None:
        """A collective and the wait for it are queued."""

    def message_issued(self, sender: int, receiver: int) -> None:
        """A message between two ranks is queued."""

    def message_awaited(self, sender: int, receiver: int) -> None:
        """The wait for the next message between them is queued."""


class SpanStack:
    """This process's open spans and the counters that they keep. Spans are opened by one thread."""

    __slots__ = (
        "blocked_seconds",
        "failed",
        "innermost",
        "last_change",
        "last_wait",
        "launched",
        "outermost_wait",
        "progress",
        "recorder",
        "sequence",
        "slow_ended",
        "step",
        "stream_clock",
    )

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self.stream_clock: StreamClock | None = None  # on a GPU
        self.progress: Progress | None = None  # on a GPU
        self.clear()

    def clear(self) -> None:
        """Forget everything, as at the start of a run."""
        self.step, self.sequence = 0, 0
        self.innermost: Span | None = None
        self.last_wait: Event | None = None  # that ended
        self.last_change = monotonic()
        self.slow_ended = float("-inf")  # when the last slow span ended
        self.failed: tuple[BaseException, Span] | None = None  # an error and the innermost span that it left
        self.outermost_wait: Span | None = None
        self.blocked_seconds = 0.0  # in outermost waits, since `begin_step` or `take_blocked_seconds`
        self.launched: set[dist.ProcessGroup | tuple[int, ...] | None] = set()  # groups and peers, on a GPU


SPANS = SpanStack()


class Span:
    """A context manager: while it is open, this is what the rank does."""

    __slots__ = ("entered", "event", "group", "outer", "slow", "state")

    def __init__(self, event: Event, state: RankState, group: Group = None, slow: bool = False) -> None:
        self.event, self.state, self.group, self.slow = event, state, group, slow
        self.outer: Span | None = None
        self.entered = 0.0

    def __enter__(self) -> Span:
        self.outer = SPANS.innermost
        SPANS.sequence += 1
        self.entered = SPANS.last_change = monotonic()
        SPANS.innermost = self
        if self.state is WAITING and SPANS.outermost_wait is None:
            SPANS.outermost_wait = self
            if SPANS.stream_clock is not None:
                SPANS.stream_clock.enter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.note_failure(error)
        SPANS.innermost = self.outer
        if self.state is WAITING:
            SPANS.last_wait = self.event
            if SPANS.progress is not None and error is None and isinstance(self.group, dist.ProcessGroup):
                SPANS.progress.issued(self.group)
        SPANS.last_change = now = monotonic()
        if self.slow:
            SPANS.slow_ended = now
        if SPANS.recorder is not None:
            SPANS.recorder.span_ended(self, now)
        if SPANS.outermost_wait is self:
            SPANS.outermost_wait = None
            SPANS.blocked_seconds += now - self.entered
            if SPANS.stream_clock is not None:
                SPANS.stream_clock.leave()

    def note_failure(self, error: BaseException) -> None:
        """The error came from here, unless a span inside has said so."""
        if SPANS.failed is None or SPANS.failed[0] not in (error, error.__cause__):
            SPANS.failed = (error, self)


@contextmanager
def launching(event: Event, group: Group = None) -> Iterator[None]:
    """Around the launch of a collective or message, whose wait is a span: an error is the collective's, named as there.

    Gloo raises at the launch where it knows already that a rank is lost. NCCL connects the ranks of a group at its
    first launch, and the host waits for all of them: that launch is a wait.
    """
    first = wait_span(event, _ranks_of(group)) if _is_first_launch(group) else nullcontext()
    try:
        with first:
            yield
    except BaseException as error:
        span = wait_span(event, group)
        span.outer = SPANS.innermost
        span.note_failure(error)
        raise


def _is_first_launch(group: Group) -> bool:
    """Whether a GPU's collective is the first of its group, or a message the first to these peers."""
    key = group if group is None or isinstance(group, dist.ProcessGroup) else tuple(group)
    if SPANS.progress is None or key in SPANS.launched:
        return False
    SPANS.launched.add(key)
    return True


def _ranks_of(group: Group) -> Iterable[int] | None:
    """The wait for a connection is no collective, and `Progress` must not count it as the group's."""
    return dist.get_process_group_ranks(group) if isinstance(group, dist.ProcessGroup) else group


def group_text(group: Group) -> str:
    """The ranks of a span's group, as a heartbeat carries them."""
    if group is None:
        return ""
    return encode_ranks(dist.get_process_group_ranks(group) if isinstance(group, dist.ProcessGroup) else group)


def wait_span(event: Event, group: Group = None) -> Span:
    """Around the blocking wait for a collective, or a call of torch's that waits for other ranks.

    `parallel.timeout_seconds` limits how long it may take.

    Args:
        group: the process group, the ranks that are waited for, or None for all ranks.
    """
    return Span(event, WAITING, group)


def work_span(event: Event, slow: bool = False) -> Span:
    """Around work of this rank. It gives context to the spans inside, and has no time limit of its own.

    Ranks that wait for it meanwhile do: `parallel.timeout_seconds`, or `watchdog.SLOW_FACTOR` times that for a span
    that may take long, ``slow`` (writing a checkpoint).
    """
    return Span(event, WORKING, None, slow)


@contextmanager
def stream_wait() -> Iterator[None]:
    """Around a wait of the compute stream for other ranks outside of wait spans; `take_blocked_seconds` counts it."""
    clock = SPANS.stream_clock
    if clock is None or SPANS.outermost_wait is not None:
        yield
        return
    SPANS.outermost_wait = Span(Event(SpanKind.DEVICE), WAITING)  # so that spans inside do not count again
    clock.enter()
    try:
        yield
    finally:
        clock.leave()
        SPANS.outermost_wait = None


def device_span() -> Span:
    """Around a wait of the host for numbers of the device: behind what is queued there may be other ranks."""
    return Span(Event(SpanKind.DEVICE), WAITING)


def begin_step(number: int) -> None:
    """Spans from here on belong to this step."""
    SPANS.step = number
    SPANS.failed = None  # a run that continues has handled the error
    SPANS.outermost_wait, SPANS.blocked_seconds = None, 0.0
    if SPANS.stream_clock is not None:
        _device_seconds(SPANS.stream_clock)
    SPANS.last_change = monotonic()


def take_blocked_seconds() -> float:
    """How long this rank has waited for other ranks since `begin_step`, or the last call.

    On a CPU the time inside outermost wait spans, on a GPU the time that its compute stream waited, for which the host
    waits here.
    """
    if SPANS.stream_clock is not None:
        return _device_seconds(SPANS.stream_clock)
    seconds, SPANS.blocked_seconds = SPANS.blocked_seconds, 0.0
    return seconds


def _device_seconds(clock: StreamClock) -> float:
    SPANS.stream_clock = None  # the span is no wait of the stream
    try:
        with device_span():
            return clock.take()
    finally:
        SPANS.stream_clock = clock


def record_launch(event: Event, num_bytes: int, work: Any) -> None:
    """A collective that sends ``num_bytes`` from this rank has been launched; its wait span has the same event."""
    if SPANS.recorder is not None:
        SPANS.recorder.launched(event, num_bytes, work)


def record_send(event: Event, num_bytes: int, peer: int) -> None:
    """A message of ``num_bytes`` to the rank ``peer`` has been sent."""
    if SPANS.recorder is not None:
        SPANS.recorder.sent(event, num_bytes, peer)


class Status(NamedTuple):
    """What this rank does at one moment."""

    state: RankState
    event: Event | None  # the innermost span's, None between spans
    phase: Event | None  # that of the span around it
    idle_seconds: float  # since a span was entered or left
    group: Group
    slow_seconds_ago: float  # since the last slow span; 0 in one


def status() -> Status:
    """What this rank does now, or did when it failed."""
    failed, innermost, changed, now = SPANS.failed, SPANS.innermost, SPANS.last_change, monotonic()
    has_failed = failed is not None and innermost is None
    if failed is not None and has_failed:
        innermost = failed[1]
    if innermost is None:
        return Status(WORKING, None, None, now - changed, None, now - SPANS.slow_ended)
    ago = 0.0 if innermost.slow and not has_failed else now - SPANS.slow_ended
    phase = None if innermost.outer is None else innermost.outer.event
    state = RankState.FAILED if has_failed else innermost.state
    return Status(state, innermost.event, phase, now - changed, innermost.group, ago)
