"""A stop signal that comes while a stopped launcher finishes leaves its exit code 3."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.support.running import ROOT

LATE = """
import os, signal, sys
import launch.__main__ as program
program.VERBS["train"] = lambda words: 3
sys.argv = ["longcat", "train"]
code = program.main()
os.kill(os.getpid(), signal.SIGTERM)
sys.exit(code)
"""


def test_late_signal_leaves_the_exit_code() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-P", "-c", LATE], env=environment, check=False).returncode == 3
