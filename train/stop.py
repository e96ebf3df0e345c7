"""A wish to stop, from a signal or a time limit; the loop asks once a step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """True once SIGINT or SIGTERM came or the time is over.

    On leaving its context the signals mean what they did before.
    """

    def __init__(self, after_seconds: float) -> None:
        self.reason: str | None = None
        self.deadline = time.monotonic() + after_seconds if after_seconds else None
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """From here on a signal is a wish and no longer the end of the process."""
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT and "RANK" not in os.environ:
            # Asked twice: do not wait for the step to end. Under an agent one Ctrl-C comes twice, from the terminal and
            # from the agent.
            signal.default_int_handler(number, frame)
        self.reason = signal.Signals(number).name

    def __bool__(self) -> bool:
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = "train.stop_after_seconds"
        return self.reason is not None
