"""Requests to stop or to save that come while the launcher finishes leave its exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from launch.signals import Signals
from tests.support.running import ROOT
from train.process.stop import REQUESTS

LATE = """
import os, sys
import launch.__main__ as program
from train.process.stop import REQUESTS
code = int(sys.argv.pop())
program.VERBS["train"] = lambda words: code
found = program.main()
for number in REQUESTS:
    os.kill(os.getpid(), number)
sys.exit(found)
"""


@pytest.mark.parametrize("code", [0, 3, 4])
def test_late_signals_leave_the_exit_code(code: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-P", "-c", LATE, "train", str(code)]
    assert subprocess.run(program, env=environment, check=False).returncode == code


def test_node_runner_that_ends_ignores_them() -> None:
    before = {number: signal.getsignal(number) for number in REQUESTS}
    try:
        with Signals(ends_process=True):
            pass
        assert {signal.getsignal(number) for number in REQUESTS} == {signal.SIG_IGN}
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
