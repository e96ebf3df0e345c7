"""A checkpoint holds what the last update left in memory, or is not committed; damaged files are found later."""

from __future__ import annotations

from pathlib import Path

import pytest

from launch.__main__ import main as longcat
from tests.support.running import exit_json, lines, run_cleanly, train_here
from train.checkpoint.manifest import list_checkpoints

SMALL = ["model.num_layers=1", "train.steps=4", "logging.hash_every=0"]


@pytest.mark.parametrize("asynchronous", [False, True], ids=["blocking", "beside training"])
def test_corrupt_copy_is_never_committed(
    overrides: list[str], tmp_path: Path, asynchronous: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*overrides, *SMALL, "checkpoint.every=2", f"checkpoint.asynchronous={asynchronous}"]
    assert train_here([*words, "sdc.inject=snapshot/bits/step:2/count:1/call:3/name:lm_head/seed:3"]) == 5
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))
    record = exit_json(tmp_path / "run")
    assert record["code"] == 5
    finding = record["finding"]
    assert (finding["kind"], finding["rank"], finding["device"]) == ("checkpoint", 0, "cpu") and finding["host"]
    assert finding["tensor"] in record["message"] and "lm_head" in finding["tensor"]
    assert "there is no checkpoint yet; take the named machine out" in record["message"]
    assert "error: silent data corruption" in capfd.readouterr().err


def test_fault_at_rest_ends_the_run_before_it_is_saved(overrides: list[str], tmp_path: Path) -> None:
    words = [*overrides, *SMALL, "checkpoint.every=1", "sdc.inject=moment/lane/step:3/name:down_proj"]
    assert train_here(words) == 5
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2]
    record = exit_json(tmp_path / "run")
    assert record["finding"]["step"] == 3 and record["finding"]["layer"] == 0
    assert "step-00000002" in record["message"] and "take the named machine out" in record["message"]
    assert train_here([*overrides, *SMALL, "checkpoint.every=1"]) == 0, "the same run goes on without the fault"
    assert [row["step"] for row in lines(tmp_path / "run")] == [1, 2, 3, 4]


def test_damaged_file_is_noticed_before_it_is_used(
    overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*overrides, *SMALL, "checkpoint.every=2", "checkpoint.asynchronous=false"]
    assert train_here([*words, "sdc.inject=file/bits/step:4"]) == 0
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert run_cleanly(lambda: longcat(["checkpoint", "verify", str(newest)])) != 0
    capfd.readouterr()
    assert train_here([*words, "train.steps=5"]) == 0
    assert "step-00000002: step 2" in capfd.readouterr().out
