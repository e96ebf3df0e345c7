"""A second start of a sweep whose jobs Slurm still has, told by a squeue of the test."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.slurm.sweep_jobs import refuse_waiting, without_result
from launch.sweeps.folder import resume
from longcat.errors import ConfigError, FolderInUseError

Queue = Callable[[str], None]


@pytest.fixture
def queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Queue:
    """Puts a shell command in the place of squeue."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")

    def put(command: str) -> None:
        (programs / "squeue").write_text(f"#!/bin/sh\n{command}\n")
        (programs / "squeue").chmod(0o755)

    return put


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What submitit leaves of an array of three on Slurm, of which the first has ended, and of a job here."""
    folder = tmp_path / "rates-sweep"
    names = ["12_0/12_submission.sh", *(f"12_{task}/12_{task}_submitted.pkl" for task in range(3))]
    for name in [*names, "12_0/12_0_0_result.pkl", "777/777_submitted.pkl"]:
        path = folder / ".submitit" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def test_jobs_that_wait_are_not_submitted_again(folder: Path, queue: Queue) -> None:
    assert without_result(folder) == ["12_1", "12_2"]
    queue("echo '12_1 RUNNING'; echo '12_2 PENDING'; echo '13 PENDING'")
    with pytest.raises(FolderInUseError, match=r"12_1 \(RUNNING\), 12_2 \(PENDING\); wait for them or scancel 12,"):
        resume(folder)


def test_jobs_that_slurm_has_lost_begin_again(folder: Path, queue: Queue) -> None:
    queue("echo '12_0 COMPLETING'; echo '13 PENDING'")
    resume(folder)


@pytest.mark.parametrize("command", ["exit 1", "exec /nonexistent"])
def test_a_queue_that_does_not_answer_is_said(command: str, folder: Path, queue: Queue) -> None:
    queue(command)
    with pytest.raises(ConfigError, match=r"cannot ask Slurm whether its jobs 12_1, 12_2 of .* have ended"):
        refuse_waiting(folder)


def test_slurm_is_not_asked_without_need(folder: Path, queue: Queue) -> None:
    queue("exit 1")
    for task in (1, 2):
        (folder / ".submitit" / f"12_{task}" / f"12_{task}_0_result.pkl").touch()
    refuse_waiting(folder)
