"""Runs parts in processes of their own, so that one which fails, hangs or breaks the GPU spoils no other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from enum import StrEnum

from benchmarks.gpu.part import RESULT, Row
from benchmarks.gpu.session import ROOT


@dataclass(frozen=True)
class Part:
    """A part and the most seconds that it may take."""

    name: str
    title: str
    limit_seconds: float
    command: tuple[str, ...] = ()  # in place of the module of its name


class State(StrEnum):
    """How a part ended."""

    passed = "passed"
    failed = "failed"
    skipped = "skipped"  # it needs a GPU


@dataclass(frozen=True)
class PartResult:
    """What a part gave."""

    part: Part
    state: State
    seconds: float
    rows: list[Row]
    problem: str = ""  # why there are no rows

    @property
    def summary(self) -> str:
        """One line."""
        wrong = [row for row in self.rows if row.met is False]
        why = self.problem or "; ".join(f"{row.what}: {row.measured}" for row in wrong)
        return f"{self.state} in {self.seconds:.0f} s" + (f" ({why})" if why else "")


def run_part(part: Part, device: str) -> PartResult:
    """Run a part; end all its processes when its time is over."""
    command = part.command or (sys.executable, "-m", "benchmarks.gpu.one", part.name, device)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=part.limit_seconds)
        problem = f"exit code {process.returncode}" if process.returncode else ""
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        problem = f"not done after {part.limit_seconds:g} s"
    return judge(part, output, problem, time.monotonic() - start)


def judge(part: Part, output: str, problem: str, seconds: float) -> PartResult:
    """What a part's output says; ``problem`` is how it ended, if not well."""
    lines = output.strip().splitlines()
    results = [line for line in lines if line.startswith(RESULT)]
    if problem or not results:
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        return PartResult(part, State.failed, seconds, [], f"{problem or 'no result'}: {last[:300]}")
    found = json.loads(results[-1].removeprefix(RESULT))
    if isinstance(found, str):
        return PartResult(part, State.skipped, seconds, [], found)
    rows = [Row(**row) for row in found]
    failed = any(row.met is False for row in rows)
    return PartResult(part, State.failed if failed else State.passed, seconds, rows)
