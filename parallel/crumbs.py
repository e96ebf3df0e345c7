"""Breadcrumbs: what this rank does at present, kept so cheaply that every exchange can leave one.

A crumb cost 0.7 to 1.0 µs on busy cores; `python -m benchmarks.crumbs` measures it. No lock: each change is one
assignment, and the watching thread reads a crumb that is at most one change old.
"""

from __future__ import annotations

from time import monotonic

from parallel.blame import FAILED, WAITS, WORKS


class Trail:
    """This process's newest crumb. One for the process: exchanges are nested in one thread of control."""

    __slots__ = ("before", "changed", "failed", "sequence", "step", "top")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything, as at the start of a run."""
        self.step, self.sequence = 0, 0
        self.top: Crumb | None = None
        self.before = ""  # the exchange that ended last
        self.changed = monotonic()
        self.failed: tuple[BaseException, Crumb] | None = None  # the innermost crumb that an error went through


TRAIL = Trail()


class Crumb:
    """A context: from entering to leaving, this is what the rank does."""

    __slots__ = ("group", "outer", "state", "what")

    def __init__(self, what: str, group: str, state: str) -> None:
        self.what, self.group, self.state = what, group, state
        self.outer: Crumb | None = None

    def __enter__(self) -> Crumb:
        self.outer = TRAIL.top
        TRAIL.sequence += 1
        TRAIL.changed = monotonic()
        TRAIL.top = self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None and (TRAIL.failed is None or TRAIL.failed[0] is not error):
            TRAIL.failed = (error, self)
        TRAIL.top = self.outer
        if self.state is WAITS:
            TRAIL.before = self.what
        TRAIL.changed = monotonic()


def crumb(what: str, group: str = "") -> Crumb:
    """Around the blocking wait of an exchange, or a call of torch's that waits for other ranks.

    It is what `parallel.timeout_seconds` limits.

    Args:
        what: the exchange and its layer, as a person calls it: `expert dispatch of chunk 0, layer 3`.
        group: the mesh axis that the exchange is on.
    """
    return Crumb(what, group, WAITS)


def phase(what: str) -> Crumb:
    """Around a part of the run in which this rank works: it says where crumbs inside it are, and is not limited."""
    return Crumb(what, "", WORKS)


def begin_step(number: int) -> None:
    """Crumbs from here on belong to this step."""
    TRAIL.step = number
    TRAIL.failed = None  # who goes on has dealt with it
    TRAIL.changed = monotonic()


def state() -> tuple[str, str, str, str, float]:
    """(state, what, group, phase around it, seconds since anything changed) of this moment."""
    failed, top, changed = TRAIL.failed, TRAIL.top, TRAIL.changed
    if failed is not None and top is None:
        top = failed[1]
        return FAILED, top.what, top.group, _around(top), monotonic() - changed
    if top is None:
        return WORKS, "", "", "", monotonic() - changed
    return top.state, top.what, top.group, _around(top), monotonic() - changed


def _around(inner: Crumb) -> str:
    return "" if inner.outer is None else inner.outer.what
