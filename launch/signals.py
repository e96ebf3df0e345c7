"""Stop signals and requests to save that reach whoever starts ranks, until the ranks get them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from train.process.stop import REQUESTS, SAVE_SIGNAL, STOP_SIGNALS, is_ignored


class Signals:
    """The first stop signal and each request to save, until the ranks get them; later stop signals are ignored.

    Args:
        ends_process: the process ends after this context; signals that come later must not change its exit code.
    """

    def __init__(self, ends_process: bool = False) -> None:
        self.ends_process = ends_process
        self.stop: signal.Signals | None = None
        self.waiting: list[signal.Signals] = []

    def __enter__(self) -> Signals:
        numbers = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not is_ignored(number)]
        self.before = {number: signal.signal(number, self._note) for number in (*numbers, SAVE_SIGNAL)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_IGN if self.ends_process else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == SAVE_SIGNAL:
            self.waiting.append(SAVE_SIGNAL)
        elif self.stop is None:
            self.stop = signal.Signals(number)
            self.waiting.append(self.stop)

    def is_stopped(self) -> bool:
        return self.stop is not None

    def take(self) -> list[signal.Signals]:
        waiting, self.waiting = self.waiting, []
        return waiting


def ignore_requests() -> None:
    """For a process that ends: a request to stop or to save that comes late must not change its exit code."""
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def blocked_requests() -> Iterator[None]:
    """Processes that are started inside have these signals blocked from their first moment on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
