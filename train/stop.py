"""A request to stop, by a signal or a time limit; the loop checks it once per step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """True after SIGINT, SIGTERM or the time limit. Leaving its context restores the signal handlers."""

    def __init__(self, after_seconds: float) -> None:
        self.reason: str | None = None
        self.deadline = time.monotonic() + after_seconds if after_seconds else None
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """From now on a signal is a request and does not end the process."""
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def __enter__(self) -> StopSignal:
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT and "RANK" not in os.environ:
            # A second Ctrl-C: do not wait for the step to end. Under an agent one Ctrl-C arrives twice, from the
            # terminal and from the agent.
            signal.default_int_handler(number, frame)
        self.reason = signal.Signals(number).name

    def __bool__(self) -> bool:
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = "train.stop_after_seconds"
        return self.reason is not None
