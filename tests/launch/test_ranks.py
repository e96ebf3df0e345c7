"""A rank ends with the process that started it, and asks for that itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from launch.ranks import LocalRanks
from train.process.parent import STARTED_BY

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="ranks end with their parent on Linux")
STARTER = f"""
import os, subprocess, sys, time
code = "from train.process.parent import end_with_parent; end_with_parent(); print(1, flush=True); input()"
child = subprocess.Popen([sys.executable, "-c", code], env={{**os.environ, "{STARTED_BY}": str(os.getpid())}})
print(child.pid, flush=True)
time.sleep(99)
"""


def test_nothing_runs_between_fork_and_exec(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher has threads: Python code in the child may wait for ever for a lock that one of them held."""
    started: list[dict[str, Any]] = []

    def refuse(*_: Any, **options: Any) -> None:
        started.append(options)
        raise OSError

    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(OSError):
        LocalRanks((), 0, 1, {})
    assert "preexec_fn" not in started[0] and started[0]["env"][STARTED_BY] == str(os.getpid())


@LINUX
def test_a_rank_whose_starter_is_gone_ends_at_once() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    environment = {**os.environ, STARTED_BY: str(gone.pid)}
    done = subprocess.run([sys.executable, "-P", "-m", "train", "model=nothing"], env=environment, capture_output=True)
    assert done.returncode == -signal.SIGKILL and done.stderr == b""


@LINUX
def test_a_rank_ends_with_its_starter() -> None:
    with subprocess.Popen([sys.executable, "-c", STARTER], stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout is not None
        words = {starter.stdout.readline().strip(), starter.stdout.readline().strip()}
        (pid,) = (int(word) for word in words - {"1"})
        starter.kill()
        assert starter.stdout.read() == "", "both have closed the pipe"
    assert pid
