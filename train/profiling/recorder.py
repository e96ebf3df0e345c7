"""What a profiled step did, by lanes: computing, and each kind of exchange with the part that nothing covered."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

from parallel.mesh import Axis
from parallel.watchdog.diagnosis import WAITS
from parallel.watchdog.spans import SPANS, Span

COMPUTE, DISPATCH, COMBINE, GRADIENTS, PIPELINE, SEQUENCE = LANES = (
    "compute",
    "dispatch",
    "combine",
    "gradients",
    "pipeline",
    "sequence",
)
# How the names of waits begin, each with its lane
_BEGINNINGS = {
    "expert dispatch": DISPATCH,
    "expert counts": DISPATCH,
    "expert choices": DISPATCH,
    "expert combine": COMBINE,
    "gathered weights": GRADIENTS,
    "summed gradients": GRADIENTS,
    "sum over all ranks": GRADIENTS,
    "least of all ranks": GRADIENTS,
    "word of the first rank": GRADIENTS,
    "words of all ranks": GRADIENTS,
    "gradients of": PIPELINE,  # a micro-batch, or the embedding's other copy
    "hidden states": PIPELINE,
    "attention latents": SEQUENCE,
    "positions of tensor-parallel ranks": SEQUENCE,
    "sum over tensor-parallel ranks": SEQUENCE,
    "counts of the micro-batch": SEQUENCE,
    "largest logits": SEQUENCE,
    "sums over the vocabulary": SEQUENCE,
}
_ACTIONS = {"forward": "F", "backward": "B", "input gradients": "B", "weight gradients": "W"}


@dataclass
class Slice:
    """Work of this rank. Times here and below are in seconds of `time.monotonic`."""

    lane: str
    name: str
    start: float
    end: float


@dataclass
class CommSpan:
    """An exchange from its start to its completion, and the wait for it."""

    lane: str
    name: str
    around: str  # the phase that it was started in: `backward of micro-batch 2`
    start: float
    end: float | None = None  # None until it is known
    num_bytes: int = 0  # that left this rank; 0 where nobody counted
    blocked: tuple[float, float] | None = None  # this rank stood still from, to

    def close(self, last: float) -> None:
        """Settle the end. Where nobody saw the completion, it is the end of the wait."""
        if self.end is None:
            self.end = last if self.blocked is None else self.blocked[1]
        if self.blocked is not None and self.blocked[0] < self.end:
            self.end = max(self.end, self.blocked[1])  # it is over for this rank once it knows
        self.end = max(self.end, self.start)

    @property
    def exposed(self) -> float:
        """Blocked seconds."""
        return 0.0 if self.blocked is None else self.blocked[1] - self.blocked[0]


def lane_of(what: str, group: str = "") -> str:
    """The lane of an exchange by the name and the axis of the crumb around its wait."""
    for beginning, lane in _BEGINNINGS.items():
        if what.startswith(beginning):
            return lane
    return {Axis.PP: PIPELINE, Axis.CP: SEQUENCE, Axis.TP: SEQUENCE}.get(group, GRADIENTS)  # type: ignore[call-overload, no-any-return]


def action_of(what: str) -> str | None:
    """`F2`, `B2` or `W2` for a pipeline's work on micro-batch 2; None for any other phase."""
    kind, found, rest = what.partition(" of micro-batch ")
    number, inside, layers = rest.partition(" in layers ")
    if not found or not inside or kind not in _ACTIONS:
        return None
    first, _, last = layers.partition(" to ")
    return f"{_ACTIONS[kind]}{number}, " + (f"layer {first}" if first == last else f"layers {layers}")


class StepRecorder:
    """Keeps what crumbs tell from `start` to `finish`. The end of an exchange comes from a thread of the backend."""

    def __init__(self) -> None:
        self.spans: list[Slice] = []
        self.journeys: list[CommSpan] = []
        self.sent: list[tuple[float, str, int]] = []  # when, what, bytes
        self._under_way: dict[
            str, deque[CommSpan]
        ] = {}  # exchanges of one name are awaited in the order of their start

    def start(self) -> None:
        """Hear of all that happens from here on."""
        SPANS.recorder = self

    def finish(self) -> None:
        """Stop, and settle what has no end yet."""
        SPANS.recorder = None
        now = monotonic()
        for journey in self.journeys:
            journey.close(now)

    def left(self, wait_span: Span, now: float) -> None:
        if wait_span.state is not WAITS:
            self.spans.append(Slice(COMPUTE, wait_span.what, wait_span.entered, now))
            action = action_of(wait_span.what)
            if action is not None:
                self.spans.append(Slice(PIPELINE, action, wait_span.entered, now))
        elif SPANS.waiting is wait_span:
            begun = self._under_way.get(wait_span.what)
            if begun:
                journey = begun.popleft()
            else:  # one call starts it and waits for it
                journey = self._begin(wait_span.what, wait_span.group, wait_span.outer, wait_span.entered)
                journey.end = now
            journey.blocked = (wait_span.entered, now)

    def record_launch(self, name: str, num_bytes: int, work: Any) -> None:
        now = monotonic()
        if work is None:
            self.sent.append((now, name, num_bytes))
            return
        journey = self._begin(name, "", SPANS.top, now)
        journey.num_bytes = num_bytes
        self._under_way.setdefault(name, deque()).append(journey)

        def arrived(_: Any) -> None:
            journey.end = monotonic()

        if SPANS.streams is None:  # a GPU's future is done when the exchange has been queued: it ends with its wait
            with suppress(RuntimeError):  # some kinds of exchange have no future
                work.get_future().add_done_callback(arrived)

    def work(self, name: str, start: float, end: float) -> None:
        """A part of the model has computed."""
        self.spans.append(Slice(COMPUTE, name, start, end))

    def _begin(self, name: str, group: str, around: Span | None, start: float) -> CommSpan:
        while around is not None and around.state is WAITS:
            around = around.outer
        journey = CommSpan(lane_of(name, group), name, "" if around is None else around.what, start)
        self.journeys.append(journey)
        return journey
