"""Where a run starts from: its own newest whole checkpoint, or the place that it was told."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.train.running import NARROW, train_here

Said = pytest.CaptureFixture[str]


@pytest.fixture
def narrow(overrides: list[str]) -> list[str]:
    return [*overrides, *NARROW, "logging.hash_every=0"]


def names(folder: Path) -> list[str]:
    """What lies in a run's folder of checkpoints."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------- names that lie


def test_a_checkpoint_under_another_step_s_name_is_passed_over(narrow: list[str], tmp_path: Path, capfd: Said) -> None:
    """It would be the newest one for ever: each start would go back to it, and each save be removed for it."""
    run, words = tmp_path / "run", [*narrow, "checkpoint.keep=1", "checkpoint.every=1"]
    assert train_here([*words, "train.steps=1"]) == 0
    shutil.copytree(run / "checkpoints" / "step-00000001", run / "checkpoints" / "step-00000500")
    capfd.readouterr()
    assert train_here([*words, "train.steps=3"]) == 0
    assert "step-00000500: it holds step 1, which is not the step of its name" in capfd.readouterr().out
    assert names(run) == ["step-00000003", "step-00000500.damaged"]
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    (run / "checkpoints" / "step-00000500.damaged").rename(run / "checkpoints" / "step-00000500")
    assert train_here([*words, "train.steps=4"]) == 2
    assert "no checkpoint in" in (said := capfd.readouterr().err) and "step-00000500: it holds step 1" in said
