"""A cluster for the tests of `longcat slurm`, and jobs on it."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import pytest

from launch.__main__ import main as longcat
from tests.support.fixtures import corpus, overrides, refused
from tests.support.running import run_cleanly
from tests.support.slurm import Slurm, missing, running_slurm

__all__ = ["corpus", "overrides", "refused"]

Submit = Callable[..., str]


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Three nodes on this machine; the test is skipped where Slurm is not installed."""
    if reason := missing():
        pytest.skip(f"no Slurm here: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a short path: munge's socket is in it
    with running_slurm(folder) as cluster:
        yield cluster
    shutil.rmtree(folder)


@pytest.fixture
def submit(slurm: Slurm, capfd: pytest.CaptureFixture[str]) -> Iterator[Submit]:
    """Runs `longcat slurm … --submit`; returns the job's number. The job is cancelled at the end of the test."""
    jobs = []

    def run(words: list[str]) -> str:
        capfd.readouterr()
        with patch.dict(os.environ, slurm.environment):
            code = run_cleanly(lambda: longcat(["slurm", *words, "slurm.cpus_per_node=1", "--submit"]))
        said = capfd.readouterr()
        assert code == 0, said.err
        jobs.append(said.out.split()[-1])
        return jobs[-1]

    yield run
    for job in jobs:
        slurm.command("scancel", "--signal=KILL", job, check=False)
        slurm.command("scancel", job, check=False)
