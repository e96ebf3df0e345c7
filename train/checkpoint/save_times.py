"""saves.jsonl: how long each save took, for a scheduler that has to signal early enough before its time limit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from train.checkpoint.files import regular
from train.run_dir.sealed import seal_line, unseal_lines

SAVES = "saves.jsonl"
NEWEST = 20  # saves that count: a run may have moved to another file system


class SaveTimer:
    """Measures one save: from the request until the checkpoint is valid, and how long training waited meanwhile.

    Args:
        clock: seconds from any start.
    """

    def __init__(self, step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.step, self.clock = step, clock
        self.start = clock()
        self.blocked_seconds = 0.0
        self.end: float | None = None  # of the writing, where a thread does it

    @contextlib.contextmanager
    def blocking(self) -> Iterator[None]:
        """Training waits for the save in this context."""
        start = self.clock()
        try:
            yield
        finally:
            self.blocked_seconds += self.clock() - start

    def written(self) -> None:
        self.end = self.clock()

    def record(self, run: Path) -> str:
        """Append a line to the run's saves.jsonl; returns why it could not, which is empty if it could.

        A run can do without the line, and the next save has one of its own.
        """
        seconds = (self.clock() if self.end is None else self.end) - self.start
        line = seal_line({"step": self.step, "save_seconds": seconds, "blocked_seconds": self.blocked_seconds})
        try:
            with open(run / SAVES, "a", opener=regular) as file:
                file.write(line + "\n")
        except OSError as error:
            return f"{run / SAVES} cannot be written: {error.strerror or error}"
        return ""


def slowest_save(run: Path) -> float | None:
    """Seconds of the slowest of a run's newest saves; None where none is recorded."""
    try:
        lines = list(unseal_lines(run / SAVES))[-NEWEST:]
    except OSError:
        return None
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found += [] if isinstance(line, ValueError) else [float(line["save_seconds"])]  # a torn line
    return max(found, default=None)
