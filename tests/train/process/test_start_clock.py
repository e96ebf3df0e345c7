"""The parts of a start add up from the process's first moment to the end of the first step."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from train.process import start_clock
from train.process.search_path import ROOT
from train.process.start_clock import PARTS, StartClock

IN_A_NEW_PROCESS = """
import time
time.sleep(0.3)
from train.process.start_clock import PARTS, StartClock
for _ in range(2):
    clock = StartClock()
    for part in PARTS:
        clock.end(part)
    found = clock.metrics()
    print(*(sum(found[f"start/{part}_{kind}"] for part in PARTS) for kind in ("seconds", "cpu_seconds")))
print(clock.text())
"""


def test_the_first_clock_of_a_process_begins_with_it() -> None:
    """A sweep's next run in the same process does not count the runs before it."""
    began = time.monotonic()
    words = [sys.executable, "-P", "-c", IN_A_NEW_PROCESS]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    lines = subprocess.run(words, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    elapsed = time.monotonic() - began
    (first, cpu), (second, _) = ([float(word) for word in line.split()] for line in lines[:2])
    assert 0.3 <= first <= elapsed + 0.02  # Linux counts a process's start in hundredths
    assert 0 < cpu < first
    assert second < first - 0.2
    assert lines[2].startswith("start: 0.0 s (0.0 CPU s): imports 0.0, meeting 0.0") and "first step 0.0" in lines[2]


def test_without_linux_files_it_begins_with_the_cpu_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_clock, "PROCESS", start_clock.PROCESS.with_name("none"))
    monkeypatch.setattr(StartClock, "_is_first", True)
    clock = StartClock()
    clock.end(PARTS[0])
    assert clock.seconds[PARTS[0]] == pytest.approx(time.process_time(), abs=0.1)
