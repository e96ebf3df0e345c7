"""The ranks of one node: processes that get each signal once, end with their parent, and whose codes are kept."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from launch.fleet import GRACE_SECONDS, grace_seconds
from launch.signals import blocked_requests
from train.process.parent import STARTED_BY
from train.process.stop import STOP_SIGNALS

LAST_LINES = 40
STARTING_SECONDS = 1.0  # for ranks that start to end by themselves after a crash of another
STOPPED_STARTING_SECONDS = 120.0  # for ranks that start to meet after a stop signal; then it saves their first step
READ_BYTES = 1 << 16


class LocalRanks:
    """Processes `python -P -m train`, one per local rank.

    Args:
        first: global rank of the first.
        environment: what all of them get beside this process's environment.
    """

    def __init__(self, overrides: tuple[str, ...], first: int, count: int, environment: Mapping[str, str]) -> None:
        self.codes: dict[int, int] = {}
        self.first_failed: int | None = None
        self.failed_at: float | None = None  # seconds since 1970
        self.lines: dict[int, deque[bytes]] = {}
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self.unsent: dict[int, list[signal.Signals]] = {}
        self.readers: list[threading.Thread] = []
        self.kill_at = self.kill_starting_at = float("inf")  # of time.monotonic
        try:
            with blocked_requests():  # until the rank has handlers for them
                for local in range(count):
                    rank = first + local
                    numbers = {"RANK": str(rank), "LOCAL_RANK": str(local), STARTED_BY: str(os.getpid())}
                    own = {**os.environ, **environment, **numbers}
                    process = subprocess.Popen(
                        [sys.executable, "-P", "-m", "train", *overrides],
                        env=own,
                        stdin=subprocess.DEVNULL,
                        stderr=subprocess.PIPE,
                        start_new_session=True,  # a terminal's signals come through this process alone
                    )
                    self.processes[rank], self.unsent[rank] = process, []
                    self.lines[rank] = deque(maxlen=LAST_LINES)
        except BaseException:
            self.kill()
            raise
        for rank, process in self.processes.items():  # after the last fork
            assert process.stderr is not None
            reader = threading.Thread(target=pass_through, args=(process.stderr, self.lines[rank]), daemon=True)
            reader.start()
            self.readers.append(reader)

    def poll(self) -> bool:
        """Note ends, send what waits, kill what has had its time; returns whether all have ended."""
        now = time.monotonic()
        if now > self.kill_at:
            self.kill()
        for rank, process in self.processes.items():
            if rank in self.codes:
                continue
            code = process.poll()
            if code is not None:
                self.codes[rank] = code
                if code and self.first_failed is None:
                    self.first_failed, self.failed_at = rank, time.time()
                continue
            if now > self.kill_starting_at and not handles(process.pid, signal.SIGTERM):
                process.kill()
            for number in [number for number in self.unsent[rank] if handles(process.pid, number)]:
                self.unsent[rank].remove(number)
                process.send_signal(number)
        return len(self.codes) == len(self.processes)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to each rank that runs, as soon as it has a handler: without one it would only die."""
        for waiting in self.unsent.values():
            waiting.append(number)
        if number in STOP_SIGNALS:
            self._kill_starting(STOPPED_STARTING_SECONDS)

    @property
    def grace_seconds(self) -> float:
        """How long the others may go on after the failures so far; infinite without one."""
        return min((grace_seconds(code) for code in self.codes.values() if code), default=float("inf"))

    def end_within(self, seconds: float) -> None:
        """Kill ranks that still run so many seconds from now, or from an earlier call with fewer.

        After a crash those that have not met the others yet, which have no handlers, have a second: they would wait
        for ranks that are gone.
        """
        self.kill_at = min(self.kill_at, time.monotonic() + seconds)
        if seconds <= GRACE_SECONDS:
            self._kill_starting(min(seconds, STARTING_SECONDS))

    def _kill_starting(self, seconds: float) -> None:
        """Kill ranks that have no handlers so many seconds from now: they have nothing to save."""
        self.kill_starting_at = min(self.kill_starting_at, time.monotonic() + seconds)

    def kill(self) -> None:
        """End what still runs, without saving."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()

    def last_lines(self, rank: int | None) -> str:
        """What a rank wrote to stderr last."""
        end = time.monotonic() + 1.0  # something that a rank has started may keep its stderr open
        for reader in self.readers:
            reader.join(max(end - time.monotonic(), 0.0))
        return "" if rank is None else b"".join(self.lines[rank]).decode(errors="replace")


def pass_through(source: IO[bytes], kept: deque[bytes]) -> None:
    """Copy a rank's stderr to this process's, and keep its last lines."""
    for line in iter(lambda: source.readline(READ_BYTES), b""):
        kept.append(line)
        with contextlib.suppress(OSError, ValueError):
            if hasattr(sys.stderr, "buffer"):
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()
            else:  # a notebook's
                sys.stderr.write(line.decode(errors="replace"))


def handles(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal; True where the system does not tell (it is not Linux)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return not Path("/proc/self/status").exists()
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "")
    return not caught or bool(int(caught, 16) >> (number - 1) & 1)
