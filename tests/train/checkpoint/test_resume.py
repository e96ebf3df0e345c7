"""Where a run starts: from its own newest valid checkpoint, or from checkpoint.resume."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main as longcat
from tests.support.running import NARROW, lines, train_here
from train.loop import Loop

Said = pytest.CaptureFixture[str]


@pytest.fixture
def narrow(overrides: list[str]) -> list[str]:
    return [*overrides, *NARROW, "logging.hash_every=0"]


def names(folder: Path) -> list[str]:
    """Names in a run's folder of checkpoints."""
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------- wrong names


def test_checkpoint_under_another_step_s_name_is_skipped(narrow: list[str], tmp_path: Path, capfd: Said) -> None:
    """It would stay the newest for ever: each start would return to it, and each save would be pruned."""
    run, words = tmp_path / "run", [*narrow, "checkpoint.keep=1", "checkpoint.every=1"]
    assert train_here([*words, "train.steps=1"]) == 0
    shutil.copytree(run / "checkpoints" / "step-00000001", run / "checkpoints" / "step-00000500")
    capfd.readouterr()
    assert train_here([*words, "train.steps=3"]) == 0
    assert "step-00000500: it contains step 1, which is not the step of its name" in capfd.readouterr().out
    assert names(run) == ["step-00000003", "step-00000500.damaged"]
    shutil.rmtree(run / "checkpoints" / "step-00000003")
    (run / "checkpoints" / "step-00000500.damaged").rename(run / "checkpoints" / "step-00000500")
    assert train_here([*words, "train.steps=4"]) == 2
    assert "no checkpoint in" in (said := capfd.readouterr().err) and "step-00000500: it contains step 1" in said


# ------------------------------------------------------------------------------------- another configuration


@pytest.mark.parametrize("change", ["optim.lr=0.5", "train.global_batch_size=8", "train.elastic_bits=2"])
def test_own_checkpoints_keep_the_configuration(change: str, narrow: list[str], tmp_path: Path, capfd: Said) -> None:
    """Also after `remove this file alone`, the cure for a config.yaml that cannot be read."""
    assert train_here([*narrow, "train.steps=2"]) == 0
    (tmp_path / "run" / "config.yaml").unlink()
    capfd.readouterr()
    assert train_here([*narrow, "train.steps=3", change]) == 2
    said = capfd.readouterr().err
    assert f"step-00000002 of this run is of another configuration: {change.partition('=')[0]} was " in said
    assert "set them back to resume it, or choose another run.name" in said
    assert names(tmp_path / "run") == ["step-00000002"] and len(lines(tmp_path / "run")) == 2
    assert train_here([*narrow, "train.steps=3", "logging.every=2"]) == 0
    other = [*narrow, "run.name=other", f"checkpoint.resume={tmp_path / 'run'}", "train.steps=5"]
    assert train_here([*other, change]) == 0


def test_a_checkpoint_put_into_a_new_run_may_change(narrow: list[str], tmp_path: Path) -> None:
    """`longcat grow` may write where the new run finds its checkpoint: no step of that run was trained."""
    assert train_here([*narrow, "train.steps=2"]) == 0
    target = tmp_path / "deep" / "checkpoints" / "step-00000002"
    assert longcat(["grow", f"source={tmp_path / 'run'}", f"target={target}"]) == 0
    deep = [*narrow, "model.num_layers=2", "run.name=deep", "optim.lr=0.002"]
    assert train_here([*deep, "train.steps=3"]) == 0
    (tmp_path / "deep" / "config.yaml").unlink()
    assert train_here([*deep, "train.steps=4", "optim.lr=0.004"]) == 2


# ------------------------------------------------------------------------------------- checkpoint.resume


def test_run_killed_before_its_first_save_starts_over(
    narrow: list[str], tmp_path: Path, capfd: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice, and by the default `auto`; not from random weights."""
    assert train_here([*narrow, "train.steps=2"]) == 0
    words, source = [*narrow, "run.name=second", "train.steps=4"], tmp_path / "run"

    def die(*_: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "run", die)
        for more in ([f"checkpoint.resume={source}"], []):
            with pytest.raises(ZeroDivisionError):
                train_here([*words, *more])
    assert names(tmp_path / "second") == []
    source.rename(tmp_path / "moved")
    capfd.readouterr()
    assert train_here(words) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and f"checkpoint.resume={source}, which is gone; name its new path" in said[0]
    (tmp_path / "moved").rename(source)
    assert train_here(words) == 0
    assert f"no checkpoint of this run yet: checkpoint.resume={source}, as in its config.yaml" in capfd.readouterr().out
    assert [row["step"] for row in lines(tmp_path / "second")] == [3, 4]


def test_going_back_to_an_own_step_works_on_another_disk(narrow: list[str], tmp_path: Path, capfd: Said) -> None:
    """The folder of checkpoints is a symbolic link, as on a cluster with a large scratch disk."""
    run, words = tmp_path / "run", [*narrow, "checkpoint.every=1", "checkpoint.keep=0"]
    (tmp_path / "scratch").mkdir()
    run.mkdir()
    (run / "checkpoints").symlink_to(tmp_path / "scratch")
    assert train_here([*words, "train.steps=3"]) == 0
    capfd.readouterr()
    assert train_here([*words, "train.steps=2", f"checkpoint.resume={run / 'checkpoints' / 'step-00000001'}"]) == 0
    printed = capfd.readouterr().out
    assert f"resumed from {run}/checkpoints/step-00000001: step 1" in printed and "is not used" not in printed
    assert names(run) == ["step-00000001", "step-00000002", "step-00000002.abandoned", "step-00000003.abandoned"]


def test_going_back_to_an_abandoned_step_keeps_earlier_ones(narrow: list[str], tmp_path: Path) -> None:
    """The name of a checkpoint that was set aside is not one of a step; the state says which step it is."""
    run, words = tmp_path / "run", [*narrow, "checkpoint.every=1", "checkpoint.keep=0"]
    assert train_here([*words, "train.steps=3"]) == 0
    folder = run / "checkpoints"
    assert train_here([*words, "train.steps=2", f"checkpoint.resume={folder / 'step-00000001'}"]) == 0
    assert train_here([*words, "train.steps=4", f"checkpoint.resume={folder / 'step-00000003.abandoned'}"]) == 0
    assert {"step-00000001", "step-00000002", "step-00000004"} <= set(names(run))


def test_unused_resume_path_is_reported_and_must_exist(narrow: list[str], tmp_path: Path, capfd: Said) -> None:
    assert train_here([*narrow, "train.steps=1", "run.name=other"]) == 0
    assert train_here([*narrow, "train.steps=2"]) == 0
    capfd.readouterr()
    other = tmp_path / "other"
    assert train_here([*narrow, "train.steps=3", f"checkpoint.resume={other}"]) == 0
    printed = capfd.readouterr().out
    assert printed.count(f"checkpoint.resume={other} is not used: this run has checkpoints of its own") == 1
    assert f"resumed from {tmp_path}/run/checkpoints/step-00000002" in printed
    assert train_here([*narrow, "train.steps=4", f"checkpoint.resume={tmp_path / 'nowhere'}"]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and f"checkpoint.resume={tmp_path / 'nowhere'} is no folder; use auto" in said[0]
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2, 3]


# ------------------------------------------------------------------------------------- a disk that fails


@pytest.mark.parametrize(("where", "call"), [(Path, "stat"), (os, "open")])
def test_unreadable_file_makes_its_checkpoint_invalid(
    where: Any, call: str, narrow: list[str], tmp_path: Path, capfd: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, plain = tmp_path / "run", getattr(where, call)
    assert train_here([*narrow, "train.steps=2", "checkpoint.every=1"]) == 0

    def fail(path: Any, *arguments: Any, **named: Any) -> Any:
        if str(path).endswith(".distcp") and Path(path).parent.name == "step-00000002":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return plain(path, *arguments, **named)

    problem = "__0_0.distcp cannot be read (Input/output error)"
    with monkeypatch.context() as patch:
        patch.setattr(where, call, fail)
        capfd.readouterr()
        assert longcat(["checkpoint", "verify", str(run)]) == 2
        assert problem in capfd.readouterr().out
        assert train_here([*narrow, "train.steps=2"]) == 0
    printed = capfd.readouterr()
    assert f"step-00000002: {problem}" in printed.out and "Traceback" not in printed.err
    assert names(run) == ["step-00000001", "step-00000002", "step-00000002.damaged"]
