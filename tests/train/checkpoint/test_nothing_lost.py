"""A run keeps what it may need again: checkpoints, logged steps, the reason of its exit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.running import NARROW, train_here
from train.checkpoint.files import lock_folder
from train.compose import compose
from train.data.build import build


def steps_there(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def damage(checkpoint: Path) -> None:
    shard = next(checkpoint.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(bytes(data))


@pytest.fixture
def narrow(overrides: list[str]) -> list[str]:
    return [*overrides, *NARROW, "logging.hash_every=0"]


def test_damaged_checkpoint_does_not_count_as_kept(narrow: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train_here([*narrow, "train.steps=6", "checkpoint.every=2", "checkpoint.keep=3"]) == 0
    damage(folder / "checkpoints" / "step-00000006")
    assert train_here([*narrow, "train.steps=5", "checkpoint.every=1", "checkpoint.keep=1"]) == 0
    assert steps_there(folder) == ["step-00000005", "step-00000006.damaged"]
    assert train_here([*narrow, "train.steps=7"]) == 0


def test_going_back_keeps_later_steps_as_abandoned(
    narrow: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train_here([*narrow, "train.steps=6", "checkpoint.every=2", "checkpoint.keep=3"]) == 0
    back = f"checkpoint.resume={folder}/checkpoints/step-00000002"
    assert train_here([*narrow, "train.steps=3", "checkpoint.keep=2", back]) == 0
    kept = ["step-00000002", "step-00000003", "step-00000004.abandoned", "step-00000006.abandoned"]
    assert steps_there(folder) == kept
    capfd.readouterr()
    assert train_here([*narrow, "train.steps=5", "checkpoint.keep=2"]) == 0
    assert "resumed from" in (text := capfd.readouterr().out)
    assert "step-00000003" in text


def test_logged_steps_past_the_checkpoint_are_moved(
    narrow: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert train_here([*narrow, "train.steps=4"]) == 0
    before = (folder / "metrics.jsonl").read_text().splitlines()
    shutil.rmtree(folder / "checkpoints")
    capfd.readouterr()
    assert train_here([*narrow, "train.steps=2"]) == 0
    assert "4 logged steps after step 0 have no checkpoint" in capfd.readouterr().out
    assert (folder / "superseded.jsonl").read_text().splitlines() == before
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_partial_folders_are_removed_at_the_next_start(narrow: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train_here([*narrow, "train.steps=2"]) == 0
    for name in ("step-00000009.partial", "step-00000001.removed"):
        (folder / "checkpoints" / name).mkdir()
    assert train_here([*narrow, "train.steps=3"]) == 0
    assert steps_there(folder) == ["step-00000002", "step-00000003"]


def test_foreign_files_and_folders_survive_the_next_start(narrow: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    for name in ("step-00000009.partial", "step-00000008.partial", "elsewhere"):
        (folder / name).mkdir(parents=True)
    (folder / "notes.partial").write_text("mine")
    (folder / "link.partial").symlink_to(folder / "elsewhere")
    with lock_folder(folder / "step-00000009.partial"):
        assert train_here([*narrow, "train.steps=1"]) == 0
    left = ["elsewhere", "link.partial", "notes.partial", "step-00000001"]
    assert steps_there(tmp_path / "run") == [*left, "step-00000009.partial"]
    assert train_here([*narrow, "train.steps=2"]) == 0
    assert steps_there(tmp_path / "run") == [*left, "step-00000002"], "the one that wrote it is dead"


def test_failing_report_does_not_hide_the_exit(
    narrow: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(folder: Path) -> Path:
        raise RuntimeError("no ink")

    monkeypatch.setattr("train.report.page.write_report", fail)
    assert train_here([*narrow, "train.stop_after_seconds=0.01"]) == 3
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 3
    assert "no report: RuntimeError: no ink" in capfd.readouterr().out


def test_non_finite_weights_are_not_saved(narrow: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finite gradient can still give a non-finite update: here the third step does."""
    from train.step import Stepper

    plain = Stepper._update

    def blow_up(self: Stepper, *arguments: Any) -> None:
        plain(self, *arguments)
        if self.state.counters.step == 2:
            next(iter(self.state.store.local_boxes())).values.fill_(float("nan"))

    monkeypatch.setattr(Stepper, "_update", blow_up)
    assert train_here([*narrow, "train.steps=5", "checkpoint.every=1"]) == 4
    assert steps_there(tmp_path / "run") == ["step-00000001", "step-00000002"]


def test_rebuilt_corpus_makes_another_run(
    narrow: list[str], corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "text", tmp_path / "corpus"
    text.mkdir()
    for number in range(20):
        (text / f"{number}.txt").write_text(Path(__file__).read_text()[number * 50 :])
    words = [*narrow, f"data.source={text}", f"data.out={out}", f"data.paths=[{out / 'corpus'}]"]
    build(compose(words).data, 512)
    assert train_here([*words, "train.steps=2"]) == 0
    build(compose([*words, "data.max_bytes=40000", "data.overwrite=true"]).data, 512)
    capfd.readouterr()
    assert train_here([*words, "train.steps=4"]) == 2
    assert "is now a corpus of other contents in" in capfd.readouterr().err


def test_run_past_its_last_step_changes_nothing(
    narrow: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert train_here([*narrow, "train.steps=4"]) == 0
    config = (tmp_path / "run" / "config.yaml").read_text()
    capfd.readouterr()
    assert train_here([*narrow, "train.steps=3"]) == 0
    assert "already at step 4 of train.steps=3" in capfd.readouterr().out
    assert (tmp_path / "run" / "config.yaml").read_text() == config
