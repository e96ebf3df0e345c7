"""When steps were finished, by watching metrics.jsonl from outside the ranks."""

from __future__ import annotations

import contextlib
import hashlib
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from train.checkpoint.files import regular
from train.run_dir.sealed import unseal_line

WINDOW_BYTES = 4 << 20  # of the file's end that is read when nothing of it is known
POLL_SECONDS = 0.1
MAX_KEPT = 20_000  # finished steps of one start, and lines


@dataclass(frozen=True)
class Line:
    """A line that was read: where it is, and what tells whether it still is."""

    step: int
    start: int
    end: int
    digest: bytes


class RunProgress:
    """The newest step of a run, and when each step since the last `begin` was finished.

    A resume first takes the steps after its checkpoint out of the file; steps are finished from then on. It may have
    written several steps, and as many as were there before, when the file is looked at again: lines are told apart by
    their bytes.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path, self.clock = path, clock
        self.newest: dict[str, Any] = {}
        self.lines: list[Line] = []
        self.finished: list[tuple[int, float]] = []  # (step, time)
        self.last_step_time: float | None = None
        self._stamp: tuple[int, int, int] | None = None
        self._looked = clock()
        self._stopped, self._looking = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="progress")
        self.base = self.best = 0
        self.look()
        self.last_step_time = None
        self.begin()

    @property
    def step(self) -> int:
        return self.lines[-1].step if self.lines else 0

    def begin(self) -> None:
        """A new start of the ranks follows."""
        self.look()
        self.base, self.finished = self.step, []

    def look(self) -> None:
        """Notice what has changed since the last look."""
        with self._looking, contextlib.suppress(OSError):
            self._look()

    def _look(self) -> None:
        status = self.path.stat()
        stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
        if stamp == self._stamp:
            return
        now, before = self.clock(), len(self.lines)
        with open(self.path, "rb", opener=regular) as file:
            while self.lines and not is_there(file, self.lines[-1]):
                self.lines.pop()
            if len(self.lines) < before and not self.finished:
                self.base = self.step  # of the line before those that a resume took out
            self.finished = [(step, when) for step, when in self.finished if step <= self.step]
            found = self._read(file)
        self._stamp = stamp
        if found:
            self.newest = found[-1][1]
            if not self.lines and found[0][0].start:
                found = found[-1:]  # which of those before are new is not known
                self.base = found[0][0].step - 1
            self._add(found, now)
        elif len(self.lines) < before:
            self.newest = {"step": self.step}
        self._looked = now

    def _read(self, file: BinaryIO) -> list[tuple[Line, dict[str, Any]]]:
        """The complete lines behind those that are known."""
        size, start = file.seek(0, 2), self.lines[-1].end if self.lines else 0
        if not self.lines and size > WINDOW_BYTES:
            file.seek(size - WINDOW_BYTES)
            file.readline()
            start = file.tell()
        file.seek(start)
        found = []
        for raw in file.read(size - start).rpartition(b"\n")[0].splitlines(keepends=True):
            line = raw if raw.endswith(b"\n") else raw + b"\n"
            end = start + len(line)
            with contextlib.suppress(ValueError, KeyError, TypeError):
                row = unseal_line(line)
                found.append((Line(int(row["step"]), start, end, digest(line)), row))
            start = end
        return found

    def _add(self, found: list[tuple[Line, dict[str, Any]]], now: float) -> None:
        """Steps that were finished since the last look; of several the time follows from the seconds that each took."""
        when, times = now, []
        for _, row in reversed(found):
            times.append(max(when, self._looked))
            seconds = row.get("step_seconds")
            when -= seconds if isinstance(seconds, int | float) and seconds > 0 else 0.0
        self.finished += [(line.step, at) for (line, _), at in zip(found, reversed(times), strict=True)]
        self.lines += [line for line, _ in found]
        self.last_step_time = now
        self.best = max(self.best, *(line.step for line, _ in found))
        if len(self.finished) > MAX_KEPT:
            del self.finished[1 : MAX_KEPT // 2 : 2]  # of old steps every second: a run may take months
        if len(self.lines) > MAX_KEPT:
            del self.lines[: MAX_KEPT // 2]

    def _watch(self) -> None:
        while not self._stopped.wait(POLL_SECONDS):
            self.look()

    def __enter__(self) -> RunProgress:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()


def digest(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=16).digest()


def is_there(file: BinaryIO, line: Line) -> bool:
    """Whether the file still has this line at its place."""
    file.seek(line.start)
    return digest(file.read(line.end - line.start)) == line.digest
