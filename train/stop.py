"""Requests to stop or to save, by a signal or a time limit; the loop checks them once per step."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

# Requests to save and stop: Ctrl-C, a scheduler's end of a job (Slurm sends what --signal names, others XCPU), a lost
# terminal
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)
SAVE_SIGNAL = signal.SIGUSR2  # save and train on
REQUESTS = (*STOP_SIGNALS, SAVE_SIGNAL)


class StopSignal:
    """True after a stop signal or the time limit. Leaving its context restores the signal handlers.

    A node runner starts ranks with these signals blocked; one that came before its handler takes effect here.
    """

    def __init__(self, after_seconds: float) -> None:
        self.reason: str | None = None
        self.save_requested = False
        self.deadline = time.monotonic() + after_seconds if after_seconds else None
        self._before: dict[signal.Signals, Any] = {}
        self._blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])

    def listen(self) -> None:
        """From now on a stop signal is a request and does not end the process."""
        for number in STOP_SIGNALS:
            if not (number == signal.SIGHUP and is_ignored(number)):
                self._before[number] = signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def take_save_request(self) -> bool:
        """Whether a signal has requested a checkpoint since the last call."""
        requested, self.save_requested = self.save_requested, False
        return requested

    def __enter__(self) -> StopSignal:
        self._before[SAVE_SIGNAL] = signal.signal(SAVE_SIGNAL, self._on_save_signal)  # its default ends the process
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [SAVE_SIGNAL])
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, self._blocked)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.reason is not None and number == signal.SIGINT and "RANK" not in os.environ:
            # A second Ctrl-C: do not wait for the step to end. Under torchrun one Ctrl-C arrives twice, from the
            # terminal and from its agent.
            signal.default_int_handler(number, frame)
        self.reason = signal.Signals(number).name

    def _on_save_signal(self, number: int, frame: FrameType | None) -> None:
        self.save_requested = True

    def __bool__(self) -> bool:
        if self.reason is None and self.deadline is not None and time.monotonic() > self.deadline:
            self.reason = "train.stop_after_seconds"
        return self.reason is not None


def is_ignored(number: signal.Signals) -> bool:
    """Whether the process was started with this signal ignored, as `nohup` does with SIGHUP."""
    return signal.getsignal(number) == signal.SIG_IGN
