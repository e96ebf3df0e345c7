"""Requests to stop or to save, by a signal or a time limit; the loop checks them once per step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# Requests to save and stop: Ctrl-C, a scheduler's end of a job (Slurm sends what --signal names, others XCPU), a lost
# terminal
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP, signal.SIGXCPU)
SAVE_SIGNAL = signal.SIGUSR2  # save and train on
REQUESTS = (*STOP_SIGNALS, SAVE_SIGNAL)


class Interrupted(KeyboardInterrupt):
    """A stop signal came where there is nothing to save; the message is one line for the user, the exit code 3."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped on {signal.Signals(number).name} before the end; the same command starts again")


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, the first stop signal raises `Interrupted`, so that what is half written is removed.

    Later ones are ignored, and so is a request to save. A signal that the process was started with ignored stays so.
    Outside of the main thread, which alone may set handlers, nothing changes.
    """
    before: dict[signal.Signals, Any] = {}

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, _ignore)
        raise Interrupted(number)

    if threading.current_thread() is threading.main_thread():
        for number in REQUESTS:
            if not is_ignored(number):
                before[number] = signal.signal(number, _ignore if number == SAVE_SIGNAL else interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred_interrupt() -> Iterator[None]:
    """Inside, Ctrl-C waits until the end, and then raises KeyboardInterrupt: other ranks are in the same collectives.

    An exception from inside is then its context. A second Ctrl-C raises at once, as in `StopSignal`. Outside of the
    main thread, or where SIGINT has another handler than Python's own, nothing changes.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    is_due = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal is_due
        if is_due and is_second_ctrl_c(number):
            is_due = False  # this one ends it
            raise KeyboardInterrupt("stopped by a second Ctrl-C, before the end")
        is_due = True

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if is_due:
            raise KeyboardInterrupt


def is_second_ctrl_c(number: int) -> bool:
    """Whether a repeated signal is a second Ctrl-C: under torchrun one arrives twice, from terminal and agent."""
    return number == signal.SIGINT and "RANK" not in os.environ


def _ignore(number: int, frame: FrameType | None) -> None:
    """A handler that does nothing. Processes that are started meanwhile do not inherit it, as they would SIG_IGN."""


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
        if self.reason is not None and is_second_ctrl_c(number):  # do not wait for the step to end
            raise KeyboardInterrupt(
                "stopped by a second Ctrl-C within a step, without saving; the same command resumes from the newest "
                "checkpoint"
            )
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
