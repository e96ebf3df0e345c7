"""Sweeps through submitit on a real Slurm: one array, failures that show and decide the exit code."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest

from launch.__main__ import main as longcat
from launch.sweeps.sweep import results
from tests.support.running import NARROW, finish, lines, program, run_cleanly
from tests.support.slurm import Slurm

Sweep = Callable[..., int]
WORDS = ("train.steps=1", "run.name=swept", "hydra/launcher=submitit_slurm")


@pytest.fixture
def sweep(slurm: Slurm, overrides: list[str]) -> Sweep:
    """Runs `longcat train -m …` with the Slurm launcher of submitit; returns its exit code."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs hydra-submitit-launcher")
    words = [*overrides, *NARROW, *WORDS]

    def run(*more: str) -> int:
        with patch.dict(os.environ, slurm.environment):
            return run_cleanly(lambda: longcat(["train", "-m", *words, *more]))

    return run


@pytest.mark.long
def test_a_failed_run_of_an_array_shows(
    slurm: Slurm, sweep: Sweep, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sweep("model.top_k=99,3") == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith("error: swept-0: model.top_k=99") and "exit code 2" in said[0]
    assert [result.code for result in results(tmp_path / "swept-sweep")] == [2, 0]
    assert len(lines(tmp_path / "swept-1")) == 1
    assert "ArrayTaskId=" in slurm.command("scontrol", "-o", "show", "jobs")


@pytest.mark.long
def test_a_cluster_that_takes_no_job_shows(sweep: Sweep, capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep("hydra.launcher.partition=nowhere", "optim.lr=1e-3,3e-3") == 1
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "invalid partition specified: nowhere" in said[0]


@pytest.mark.long
def test_a_second_start_submits_no_waiting_job_again(
    slurm: Slurm, sweep: Sweep, overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first command is killed while its array waits; when that is cancelled, a third start trains."""
    rates, held = "optim.lr=1e-3,3e-3", "+hydra.launcher.additional_parameters.hold=true"
    with patch.dict(os.environ, slurm.environment):
        first = program("launch", "train", "-m", *overrides, *NARROW, *WORDS, rates, held)
    while len(list(tmp_path.rglob("*_submitted.pkl"))) < 2:
        assert first.poll() is None, finish(first)
        time.sleep(0.1)
    first.kill()
    finish(first)
    assert sweep(rates, held) == 2
    assert "(PENDING)" in capfd.readouterr().err
    jobs = {line.split("_")[0] for line in slurm.command("squeue", "--noheader", "--format=%i").split()}
    assert len(jobs) == 1
    slurm.command("scancel", *jobs)
    assert sweep(rates) == 0
