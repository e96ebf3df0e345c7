"""Breadcrumbs: what this rank does at present, kept so cheaply that every exchange can leave one.

Crumbs also keep the clock of a step's blocked seconds, and tell a `Recorder` what happened while a step is profiled.

A crumb cost 0.7 to 1.0 µs on busy cores; `python -m benchmarks.crumbs` measures it. No lock: each change is one
assignment, and the watching thread reads a crumb that is at most one change old.
"""

from __future__ import annotations

from time import monotonic
from typing import Any, NamedTuple, Protocol

from parallel.watchdog.diagnosis import FAILED, WAITS, WORKS


class Recorder(Protocol):
    """Hears of everything while a step is profiled; times are in seconds of `time.monotonic`."""

    def left(self, wait_span: Span, now: float) -> None:
        """A crumb ends."""

    def record_launch(self, name: str, num_bytes: int, work: Any) -> None:
        """An exchange that a crumb of the same name will wait for has been started."""


class StreamClock(Protocol):
    """Measures on the device's own clock how long its compute stream stands at waits, which no host clock sees."""

    def enter(self) -> None:
        """A wait begins."""

    def leave(self) -> None:
        """It has ended as far as the host is concerned."""

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""


class SpanStack:
    """This process's newest crumb. One for the process: exchanges are nested in one thread of control."""

    __slots__ = (
        "before",
        "blocked",
        "changed",
        "failed",
        "recorder",
        "sequence",
        "slow_ended",
        "step",
        "streams",
        "top",
        "waiting",
    )

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self.streams: StreamClock | None = None  # on a GPU
        self.clear()

    def clear(self) -> None:
        """Forget everything, as at the start of a run."""
        self.step, self.sequence = 0, 0
        self.top: Span | None = None
        self.before = ""  # the exchange that ended last
        self.changed = monotonic()
        self.slow_ended = float("-inf")  # when the last part that may take long ended
        self.failed: tuple[BaseException, Span] | None = None  # the innermost crumb that an error went through
        self.waiting: Span | None = None  # the outermost crumb whose seconds are blocked ones
        self.blocked = 0.0  # seconds of this step in such crumbs


SPANS = SpanStack()


class Span:
    """A context: from entering to leaving, this is what the rank does."""

    __slots__ = ("among", "entered", "group", "outer", "slow", "state", "what")

    def __init__(self, what: str, group: str, state: str, among: Any = None, slow: bool = False) -> None:
        self.what, self.group, self.state, self.among, self.slow = what, group, state, among, slow
        self.outer: Span | None = None
        self.entered = 0.0

    def __enter__(self) -> Span:
        self.outer = SPANS.top
        SPANS.sequence += 1
        self.entered = SPANS.changed = monotonic()
        SPANS.top = self
        if self.state is WAITS and SPANS.waiting is None:
            SPANS.waiting = self
            if SPANS.streams is not None:
                SPANS.streams.enter()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and (SPANS.failed is None or SPANS.failed[0] not in (error, error.__cause__)):
            SPANS.failed = (error, self)
        SPANS.top = self.outer
        if self.state is WAITS:
            SPANS.before = self.what
        SPANS.changed = now = monotonic()
        if self.slow:
            SPANS.slow_ended = now
        if SPANS.recorder is not None:
            SPANS.recorder.left(self, now)
        if SPANS.waiting is self:
            SPANS.waiting = None
            SPANS.blocked += now - self.entered
            if SPANS.streams is not None:
                SPANS.streams.leave()


def wait_span(what: str, group: str = "", among: Any = None) -> Span:
    """Around the blocking wait of an exchange, or a call of torch's that waits for other ranks.

    It is what `parallel.timeout_seconds` limits.

    Args:
        what: the exchange and its layer, as a person calls it: `expert dispatch of chunk 0, layer 3`.
        group: the mesh axis that the exchange is on.
        among: whom it is with: a process group, the ranks waited for, or None for all ranks.
    """
    return Span(what, group, WAITS, among)


def work_span(what: str, slow: bool = False) -> Span:
    """Around a part of the run in which this rank works: it says where crumbs inside it are, and is not limited.

    Others that wait meanwhile are: by `parallel.timeout_seconds`, or by `watch.SLOW_FACTOR` times that where a rank
    that is alive may take long, ``slow`` (writing a checkpoint).
    """
    return Span(what, "", WORKS, None, slow)


def begin_step(number: int) -> None:
    """Crumbs from here on belong to this step."""
    SPANS.step = number
    SPANS.failed = None  # who goes on has dealt with it
    SPANS.waiting, SPANS.blocked = None, 0.0
    if SPANS.streams is not None:
        SPANS.streams.take()
    SPANS.changed = monotonic()


def blocked_seconds() -> float:
    """How long this rank has stood at waits for other ranks since `begin_step`.

    On a CPU from entering a wait to leaving it, the outermost of nested ones. On a GPU what its compute stream stood.
    """
    return SPANS.blocked if SPANS.streams is None else SPANS.streams.take()


def record_launch(name: str, num_bytes: int, work: Any) -> None:
    """An exchange of ``num_bytes`` from this rank has been started; the crumb around its wait has the same name."""
    if SPANS.recorder is not None:
        SPANS.recorder.record_launch(name, num_bytes, work)


class State(NamedTuple):
    """What this rank does at one moment."""

    state: str
    what: str
    group: str
    phase: str  # the crumb around it
    still_seconds: float  # since anything changed
    among: Any
    slow_seconds_ago: float  # 0 in a slow part


def state() -> State:
    """This moment's."""
    failed, top, changed, now = SPANS.failed, SPANS.top, SPANS.changed, monotonic()
    is_failed = failed is not None and top is None
    if failed is not None and is_failed:
        top = failed[1]
    if top is None:
        return State(WORKS, "", "", "", now - changed, None, now - SPANS.slow_ended)
    ago = 0.0 if top.slow and not is_failed else now - SPANS.slow_ended
    return State(FAILED if is_failed else top.state, top.what, top.group, _around(top), now - changed, top.among, ago)


def _around(inner: Span) -> str:
    return "" if inner.outer is None else inner.outer.what
