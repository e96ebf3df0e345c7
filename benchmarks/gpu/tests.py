"""The tests of `tests/gpu`, as rows: `make test-gpu` runs them alone."""

from __future__ import annotations

import re
import subprocess
import sys

import torch

from benchmarks.gpu.part import Row, need_gpu
from benchmarks.gpu.session import ROOT


def run(device: torch.device) -> list[Row]:
    """How many passed, and each that did not."""
    need_gpu(device)
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-q", "-rfE"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    return rows_of(done.stdout, done.returncode)


def rows_of(output: str, code: int) -> list[Row]:
    """What pytest's last lines say."""
    lines = output.strip().splitlines() or ["no output"]
    failed = [Row(line, "failed", "passed", False) for line in lines if re.match(r"(FAILED|ERROR) ", line)]
    return [Row("bits of kernels and streams", lines[-1], "all passed", code == 0), *failed]
