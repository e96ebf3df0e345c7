"""A refused configuration is told to the script of a job beside exit.json, which may be another run's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from launch.__main__ import main as longcat
from longcat.errors import ConfigError, SaveError
from parallel.sdc.finding import Site
from train.process.refusal import REFUSAL
from train.run_dir.exit_file import EXIT
from train.run_dir.folder import CONFIG, lock, refuse


def test_rank_that_refuses_leaves_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder has a run, whose exit.json does not change."""
    (tmp_path / CONFIG).touch()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(REFUSAL, str(tmp_path / "refusal"))
    assert refuse(tmp_path, ConfigError("model.top_k=99: too many")) == 2
    assert (tmp_path / "refusal").read_text() == "model.top_k=99: too many\n" and not (tmp_path / EXIT).exists()


def test_what_may_pass_is_no_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks of a lost node hold the run folder for a while: the script tries again."""
    monkeypatch.setenv(REFUSAL, str(tmp_path / "refusal"))
    with lock(tmp_path), pytest.raises(ConfigError, match="in use by a running training") as in_use:
        lock(tmp_path)
    for error in (in_use.value, SaveError("disk full")):
        assert refuse(tmp_path, error) == error.exit_code
    assert not (tmp_path / "refusal").exists()


def test_program_leaves_the_reason_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REFUSAL, str(tmp_path / "refusal"))
    assert longcat(["train", f"run.dir={tmp_path}", "model.top_k=0"]) == 2
    assert "model.top_k=0" in (tmp_path / "refusal").read_text()


def test_corrupt_rank_names_its_slurm_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURMD_NODENAME", raising=False)
    assert Site.here(3, torch.device("cpu")).node is None
    monkeypatch.setenv("SLURMD_NODENAME", "gpu-17")
    assert Site.here(3, torch.device("cpu")).node == "gpu-17"
