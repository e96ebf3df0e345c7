"""When steps were finished, by watching metrics.jsonl from outside the ranks."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TAIL_BYTES = 1 << 17  # more than a line of metrics.jsonl
POLL_SECONDS = 0.1
MAX_KEPT = 20_000  # finished steps of one start


def last_line(path: Path) -> dict[str, Any]:
    """The last complete line of a file of JSON lines; empty where there is none."""
    with contextlib.suppress(OSError, ValueError), path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL_BYTES))
        complete = file.read().rpartition(b"\n")[0]
        found = json.loads(complete.rpartition(b"\n")[2])
        return found if isinstance(found, dict) else {}
    return {}


class Progress:
    """The newest step of a run, and when each step since the last `begin` was finished.

    A resume first takes the steps after its checkpoint out of the file; steps are finished from then on.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path, self.clock = path, clock
        self.newest = last_line(path)
        self.base = self.best = self.step
        self.finished: list[tuple[int, float]] = []  # (step, time)
        self.last_step_time: float | None = None
        self._stamp: tuple[int, int, int] | None = None
        self._stopped, self._looking = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="progress")

    @property
    def step(self) -> int:
        return int(self.newest.get("step", 0))

    def begin(self) -> None:
        """A new start of the ranks follows."""
        self.look()
        self.base, self.finished = self.step, []

    def look(self) -> None:
        """Notice what has changed since the last look."""
        with self._looking:
            self._look()

    def _look(self) -> None:
        try:
            status = self.path.stat()
        except OSError:
            return
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
        if stamp == self._stamp:
            return
        found, before = last_line(self.path), self.step
        if "step" not in found and status.st_size:
            return  # a line is being written
        self._stamp, self.newest = stamp, found
        if self.step > before:
            self.last_step_time = self.clock()
            self.finished.append((self.step, self.last_step_time))
            if len(self.finished) > MAX_KEPT:
                del self.finished[1 : MAX_KEPT // 2 : 2]  # of old steps every second: a run may take months
        elif self.step < before:
            self._undo(before)
        self.best = max(self.best, self.step)

    def _undo(self, before: int) -> None:
        """Steps were taken out: by a resume, before its first step, or by a rollback (health.on_spike)."""
        if not self.finished:
            self.base = self.step
        self.finished = [(step, when) for step, when in self.finished if step <= self.step]

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            self.look()

    def __enter__(self) -> Progress:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()
