"""`longcat grow`: half depth trained, grown and trained further; refusals end with code 2 and one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main as longcat
from tests.support.fixtures import Refused
from tests.support.running import NARROW, contents, train_here
from train.checkpoint.manifest import STATE

HALF = [*NARROW, "logging.hash_every=0", "train.steps=4"]


@pytest.fixture
def half(overrides: list[str]) -> list[str]:
    """The overrides of a shallow run of four steps."""
    words = [*overrides, *HALF]
    assert train_here(words) == 0
    return words


def folder_of(overrides: list[str], name: str = "run") -> Path:
    return Path(next(word for word in overrides if word.startswith("run.dir=")).removeprefix("run.dir=")) / name


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["stack", "interpose"])
def test_grown_run_resumes_where_the_shallow_one_stopped(half: list[str], tmp_path: Path, method: str) -> None:
    """Steps, tokens and schedule continue: step five, the last of the warm-up, has the peak rate."""
    before, target = contents(folder_of(half)), tmp_path / "grown"
    words = [f"source={folder_of(half)}", f"target={target}", f"growth.method={method}", "growth.factor=2"]
    assert longcat(["grow", *words]) == 0
    assert contents(folder_of(half)) == before
    assert longcat(["checkpoint", "verify", str(target)]) == 0
    deep = [*half, "model.num_layers=2", f"checkpoint.resume={target}", "run.name=deep", "train.steps=6"]
    assert train_here(deep) == 0
    shallow, steps = metrics(folder_of(half)), metrics(folder_of(half, "deep"))
    assert [step["step"] for step in steps] == [5, 6]
    assert steps[0]["tokens"] == shallow[-1]["tokens"] + shallow[0]["tokens"]
    assert steps[0]["lr"] == pytest.approx(shallow[0]["lr"] * 5)


def test_target_in_a_new_run_folder_needs_no_resume_key(half: list[str], tmp_path: Path) -> None:
    target = folder_of(half, "deep") / "checkpoints" / "step-00000004"
    assert longcat(["grow", f"source={folder_of(half)}", f"target={target}"]) == 0
    assert train_here([*half, "model.num_layers=2", "run.name=deep", "train.steps=5"]) == 0
    assert [step["step"] for step in metrics(folder_of(half, "deep"))] == [5]


def test_existing_target_is_left_alone(half: list[str], tmp_path: Path, refused: Refused) -> None:
    target = tmp_path / "grown"
    assert longcat(["grow", f"source={folder_of(half)}", f"target={target}"]) == 0
    before = contents(target)
    refused(["grow", f"source={folder_of(half)}", f"target={target}"], str(target), "not overwritten")
    assert contents(target) == before


def test_damaged_and_half_written_sources_are_refused(half: list[str], tmp_path: Path, refused: Refused) -> None:
    source, target = folder_of(half) / "checkpoints" / "step-00000004", f"target={tmp_path / 'grown'}"
    damaged = tmp_path / "step-00000004"
    shutil.copytree(source, damaged)
    shard = next(damaged.glob("*.distcp"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    refused(["grow", f"source={damaged}", target], "not a valid checkpoint", shard.name, "name another")
    shard.unlink()
    refused(["grow", f"source={damaged}", target], "not a valid checkpoint", f"{shard.name} is missing")
    (damaged / STATE).unlink()
    (damaged / "manifest.json").unlink()
    refused(["grow", f"source={damaged}", target], "not a valid checkpoint", "manifest.json")
    assert not (tmp_path / "grown").exists()


def test_partial_folder_of_another_growth_is_left_alone(half: list[str], tmp_path: Path, refused: Refused) -> None:
    other = tmp_path / "grown.partial"
    other.mkdir()
    (other / "shard").write_text("of another process")
    refused(["grow", f"source={folder_of(half)}", f"target={tmp_path / 'grown'}"], str(other), "another process")
    assert (other / "shard").is_file()


def test_grown_model_differs_from_the_shallow_one(half: list[str], tmp_path: Path, refused: Refused) -> None:
    target = tmp_path / "grown"
    assert longcat(["grow", f"source={folder_of(half)}", f"target={target}"]) == 0
    assert train_here([*half, f"checkpoint.resume={target}", "run.name=other"]) == 2


REFUSED = {
    "nothing": ([], ["needs source=DIR", "longcat grow source=DIR target=DIR"]),
    "no-target": (["source=x"], ["needs target=DIR"]),
    "no-source": (["source={tmp}/nothing", "target={tmp}/grown"], ["source=", "is no folder", "name a checkpoint"]),
    "no-checkpoint": (
        ["source={tmp}", "target={tmp}/grown"],
        ["not a valid checkpoint", "no readable manifest.json"],
    ),
    "factor-one": (["source=x", "target=y", "growth.factor=1"], ["growth.factor=1 adds no layer", "use 2 or more"]),
    "factor-text": (["source=x", "target=y", "growth.factor=two"], ["growth.factor=two", "a whole number"]),
    "factor-list": (["source=x", "target=y", "growth.factor=2,3"], ["growth.factor=2,3", "a whole number"]),
    "method": (["source=x", "target=y", "growth.method=copy"], ["growth.method=copy", "use stack or interpose"]),
    "unknown": (["sorce=x"], ["unknown key 'sorce'", "'source'"]),
    "unknown-nested": (["growth.facter=3"], ["unknown key 'growth.facter'", "'growth.factor'"]),
    "word": (["runs/half"], ["'runs/half' is no option", "write key=value"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_growth_is_refused(name: str, tmp_path: Path, refused: Refused) -> None:
    words, fragments = REFUSED[name]
    refused(["grow", *(word.format(tmp=tmp_path) for word in words)], *fragments)


def test_growing_a_run_without_checkpoints_is_refused(tmp_path: Path, refused: Refused) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    refused(["grow", f"source={tmp_path / 'run'}", f"target={tmp_path / 'grown'}"], "is a run without checkpoints")


def test_help_explains_each_method(capsys: pytest.CaptureFixture[str]) -> None:
    assert longcat(["grow", "--help"]) == 0
    said = capsys.readouterr().out
    assert "growth.method=stack" in said and "interpose" in said and "checkpoint.resume=TARGET" in said
