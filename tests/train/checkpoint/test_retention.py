"""Which renamed checkpoints a run removes when it has committed another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from train.checkpoint.manifest import STATE, set_aside
from train.checkpoint.retention import Keep, prune_after_commit


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run that went back from 40 to 20, has saved 30 again, and found 10 damaged."""
    for step, why in ((10, "damaged"), (30, "abandoned"), (40, "abandoned"), (30, "replaced"), (30, "replaced")):
        (tmp_path / f"step-{step:08d}").mkdir()
        assert set_aside(tmp_path / f"step-{step:08d}", why) is not None
    (tmp_path / "step-00000010.by-hand").mkdir()
    (tmp_path / "step-00000020").mkdir()
    return tmp_path


def save(folder: Path, step: int, keep: int) -> set[str]:
    """Commit a checkpoint; returns what is in the folder then."""
    path = folder / f"step-{step:08d}"
    path.mkdir()
    prune_after_commit(folder, Keep(newest=keep), path)
    return {path.name.removeprefix("step-000000") for path in folder.iterdir()}


def test_renamed_checkpoints_go_when_the_run_is_past_them(folder: Path) -> None:
    there = {"30.abandoned", "30.replaced", "30.replaced-1", "40.abandoned", "10.by-hand"}
    assert save(folder, 30, 2) == there | {"20", "30"}, "10 lies before both"
    assert save(folder, 40, 2) == there | {"30", "40"}
    assert save(folder, 50, 2) == {"40.abandoned", "10.by-hand", "40", "50"}
    assert save(folder, 60, 2) == {"10.by-hand", "50", "60"}


@pytest.mark.parametrize("keep", [0, 3])
def test_renamed_checkpoints_stay_without_enough_newer_ones(keep: int, folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    save(folder, 50, keep)
    assert before <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("keep", [Keep(2, every=20), Keep(2, best=1)])
def test_abandoned_milestones_stay(keep: Keep, folder: Path) -> None:
    """Those that the step, or the validation loss, would have kept."""
    (folder / "step-00000040.abandoned" / STATE).write_text('{"val_loss": 2.5}')
    for step in (50, 60, 70):
        path = folder / f"step-{step:08d}"
        path.mkdir()
        prune_after_commit(folder, keep, path)
    assert (folder / "step-00000040.abandoned").is_dir()
    assert not (folder / "step-00000030.abandoned").exists()
    assert not (folder / "step-00000030.replaced").exists()
