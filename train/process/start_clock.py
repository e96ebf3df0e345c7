"""Where a start's seconds go, from the process's first moment to the end of its first step."""

from __future__ import annotations

import os
import time
from pathlib import Path

PREFIX = "start/"  # of the metrics
PARTS = ("imports", "meeting", "groups", "model", "data", "checkpoint", "logs", "first_step")
PROCESS, BEGAN = Path("/proc/self/stat"), 19  # Linux's file, and the process's start among the fields behind its name


class StartClock:
    """Seconds of each part of a start: every call of `end` ends one of `PARTS`, and the next begins.

    The first clock of a process begins with the process, and so counts its imports; a later one, of a sweep's next run,
    begins when it is made.
    """

    _is_first = True  # in this process

    def __init__(self) -> None:
        self._last, self._cpu_last = time.monotonic(), time.process_time()
        if StartClock._is_first:
            self._last, self._cpu_last = self._last - process_age(), 0.0
        StartClock._is_first = False
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}  # of all threads of this process

    def end(self, part: str) -> None:
        now, cpu = time.monotonic(), time.process_time()
        self.seconds[part], self.cpu_seconds[part] = now - self._last, cpu - self._cpu_last
        self._last, self._cpu_last = now, cpu

    def metrics(self) -> dict[str, float]:
        """`start/imports_seconds`, `start/imports_cpu_seconds` and so on, of the parts that have ended."""
        kinds = {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds}
        return {f"{PREFIX}{part}_{kind}": found[part] for kind, found in kinds.items() for part in found}

    def text(self) -> str:
        """`start: 6.1 s (4.4 CPU s): imports 2.9, meeting 0.3, …`, of the parts that have ended."""
        parts = ", ".join(f"{part.replace('_', ' ')} {seconds:.1f}" for part, seconds in self.seconds.items())
        return f"start: {sum(self.seconds.values()):.1f} s ({sum(self.cpu_seconds.values()):.1f} CPU s): {parts}"


def process_age() -> float:
    """Seconds since this process started; where Linux's file is missing, its CPU seconds, which are fewer."""
    try:
        began = int(PROCESS.read_text().rpartition(")")[2].split()[BEGAN]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began
    except (OSError, ValueError, IndexError, AttributeError):
        return time.process_time()
