"""One machine as a fleet of one node, whose ranks run under torch's elastic agent in this process."""

from __future__ import annotations

import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from launch.fleet import Assignment, NodeReport, NodeState
from launch.supervisor.loop import supervise
from longcat.errors import OK
from train.config import Config
from train.stop import STOP_SIGNALS, is_ignored


def supervise_here(overrides: list[str], config: Config, processes: int) -> int:
    """Train on this machine with restarts; returns the exit code."""
    from launch import local

    with stop_requests() as stop:

        def run(own: Assignment, codes: dict[int, int]) -> int:
            return local.run_elastic(list(own.overrides), config, own.processes, codes, stop)

        return supervise(config, overrides, processes, ThisMachine(run, stop.is_set))


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that a stop signal sets while no ranks run; while they run, their launcher has the signals."""
    stop = threading.Event()
    signals = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not is_ignored(number)]
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class ThisMachine:
    """The nodes of a run on one machine.

    Args:
        run: starts the ranks of an assignment and waits for their end; puts the codes of those that failed into the
            dictionary, the first one first, and returns the run's exit code.
    """

    def __init__(self, run: Callable[[Assignment, dict[int, int]], int], stop_requested: Callable[[], bool]) -> None:
        self.run, self.stopped = run, stop_requested
        self.name = platform.node() or "this machine"
        self.reported: dict[int, NodeReport] = {}

    def nodes(self) -> list[NodeState]:
        return [NodeState(self.name, 0, 0.0)]

    def start(self, assignment: Assignment) -> None:
        """Start the ranks and wait for their end: their launcher handles signals in the main thread."""
        failed: dict[int, int] = {}
        code = self.run(assignment, failed)
        codes = failed or {rank: code for rank in range(assignment.processes)}
        first = None if code == OK else next(iter(codes))
        self.reported[assignment.incarnation] = NodeReport(
            self.name, assignment.incarnation, codes, first, "", time.time()
        )

    def reports(self, incarnation: int) -> list[NodeReport]:
        return [self.reported[incarnation]] if incarnation in self.reported else []

    def signal(self, number: int) -> None:
        """The launcher of the ranks has this process's signals."""

    def stop_ranks(self, incarnation: int, grace_seconds: float) -> None:
        """They have ended."""

    def stop_requested(self) -> bool:
        return self.stopped()
