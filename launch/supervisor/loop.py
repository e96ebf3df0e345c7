"""Starts the ranks again until the run is done or a person is needed; journal, ledger and page in the run folder."""

from __future__ import annotations

import json
import platform
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from launch.local import exit_written
from launch.supervisor import ledger
from launch.supervisor.causes import Cause, find_fault
from launch.supervisor.decide import Again, End, Start, decide
from launch.supervisor.ledger import Life
from launch.supervisor.page import GAVE_UP, page
from launch.supervisor.progress import Progress
from launch.supervisor.prometheus import serving
from longcat.errors import OK, STOPPED, ConfigError
from longcat.json_text import dumps
from train.checkpoint.manifest import list_checkpoints
from train.checkpoint.save_times import SAVES
from train.config import Config
from train.launch_config import JOURNAL, OnUnhealthy
from train.report import write_report
from train.run_dir import EXIT, claim_exit, forget_exit
from train.run_files import remove_quietly
from train.stop import STOP_SIGNALS, is_ignored

STOPPED_BETWEEN = "stopped while no ranks ran; the same command resumes from the last checkpoint"
REPORT = "report.html"


def supervise(config: Config, start_ranks: Callable[[dict[int, int]], int]) -> int:
    """Run ``start_ranks`` until it succeeds or `decide` ends the run; returns the exit code.

    Args:
        start_ranks: starts all ranks, waits for their end and returns the exit code; puts those of failed ranks into
            the given dictionary.
    """
    progress = Progress(config.run.folder / "metrics.jsonl")
    supervisor = Supervisor(config, progress)
    with stop_requests() as stop, serving(config.launch.metrics_port, supervisor.gauges), progress:
        while True:
            decision = supervisor.run_once(start_ranks)
            if isinstance(decision, End):
                return supervisor.finish(decision)
            supervisor.say(f"starting again in {decision.pause_seconds:.0f} s ({decision.reason})")
            if stop.wait(decision.pause_seconds):
                forget_exit(config.run.folder)
                claim_exit(config.run.folder, STOPPED, STOPPED_BETWEEN)
                supervisor.say(STOPPED_BETWEEN)
                return supervisor.finish(End(STOPPED, STOPPED_BETWEEN))


class Supervisor:
    """The history of one command's starts.

    Args:
        progress: watches the run's metrics.jsonl.
    """

    def __init__(self, config: Config, progress: Progress) -> None:
        self.config, self.progress, self.folder = config, progress, config.run.folder
        self.history: list[Start] = []
        self.lives: list[Life] = []
        remove_quietly(self.folder / GAVE_UP)

    def run_once(self, start_ranks: Callable[[dict[int, int]], int]) -> Again | End:
        """Start the ranks, wait for their end, and decide what follows."""
        settings, codes = self.config.launch, dict[int, int]()
        self.progress.begin()
        saves, before, exit_before = self._saves(), self.progress.best, exit_written(self.folder)
        begin, number = time.time(), len(self.history) + 1
        self._record({"event": "start", "incarnation": number, "time": begin, "step": self.progress.step})
        code = start_ranks(codes)
        self.progress.look()
        end = time.time()
        fault = find_fault(code, codes, self._exit() if exit_written(self.folder) != exit_before else None)
        finished = tuple(self.progress.finished)
        new_saves = self._saves()[len(saves) :]
        self.history.append(Start(fault, before, self.progress.best))
        self.lives.append(
            Life(
                begin,
                end,
                finished,
                self.progress.base,
                self._newest_checkpoint(),
                sum(float(save.get("blocked_seconds", 0.0)) for save in new_saves),
                len(new_saves),
                fault.cause not in (Cause.done, Cause.stop),
            )
        )
        decision = decide(
            self.history, settings.restarts, settings.backoff_seconds, settings.on_unhealthy == OnUnhealthy.retry
        )
        self._record(
            {
                "event": "end",
                "incarnation": number,
                "time": end,
                "cause": fault.cause,
                "code": fault.code,
                "ranks": list(fault.ranks),
                "host": platform.node(),
                "message": fault.message,
                "step": self.progress.step,
                "first_step_seconds": finished[0][1] - begin if finished else None,
                "restarts": isinstance(decision, Again),
            }
        )
        return decision

    def finish(self, end: End) -> int:
        """Write the ledger, and the page if a person is needed; returns the exit code."""
        found = ledger.summary(self.lives)
        self._record({"event": "totals", "time": time.time(), "code": end.code, **found})
        if end.code not in (OK, STOPPED):
            claim_exit(self.folder, end.code, self.history[-1].fault.message)
            with suppress(OSError):
                text = page(str(self.folder), platform.node(), self.history, self.lives, end)
                (self.folder / GAVE_UP).write_text(text)
                self.say(f"not starting again: {end.reason}; {self.folder / GAVE_UP} says more")
        for line in ledger.describe(found):
            self.say(line)
        with suppress(OSError, ConfigError):
            if (self.folder / REPORT).is_file():  # the ranks wrote it before these totals
                write_report(self.folder)
        return end.code

    def gauges(self) -> dict[str, float | None]:
        """What /metrics shows."""
        now, last = time.time(), self.progress.last_step_time
        return {
            "step": self.progress.step,
            "loss": self.progress.newest.get("loss"),
            "seconds_since_last_step": None if last is None else now - last,
            "starts": len(self.history) + 1,
            "faults": sum(life.is_fault for life in self.lives),
            "availability": ledger.summary(self.lives)["availability"] if self.lives else None,
        }

    @staticmethod
    def say(text: str) -> None:
        print(f"launch: {text}", file=sys.stderr, flush=True)

    def _record(self, line: dict[str, Any]) -> None:
        """Append to the journal. A full disk must not end what waits for space."""
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / JOURNAL).open("a") as file:
                file.write(dumps(line) + "\n")

    def _exit(self) -> dict[str, Any] | None:
        with suppress(OSError, ValueError):
            found = json.loads((self.folder / EXIT).read_text())
            return found if isinstance(found, dict) else None
        return None

    def _saves(self) -> list[dict[str, Any]]:
        found = []
        with suppress(OSError):
            for line in (self.folder / SAVES).read_text(errors="replace").splitlines():
                with suppress(ValueError):
                    found.append(json.loads(line))
        return [line for line in found if isinstance(line, dict)]

    def _newest_checkpoint(self) -> int:
        found = list_checkpoints(self.folder / "checkpoints")
        return int(found[-1].name.rpartition("-")[2]) if found else 0


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that a stop signal sets while no ranks run; while they run, their launcher has the signals."""
    stop = threading.Event()
    signals = [number for number in STOP_SIGNALS if number != signal.SIGHUP or not is_ignored(number)]
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in signals}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
