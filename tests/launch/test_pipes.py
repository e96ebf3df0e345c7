"""Pipes where a run's files should be: whoever opens one waits for its other end."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launch.__main__ import main as longcat
from tests.support.fixtures import Refused
from tests.support.running import run_cleanly, train_here
from train.checkpoint.manifest import MANIFEST, STATE, list_checkpoints

DISPENSABLE = ("metrics.jsonl", "routing.jsonl", "health.jsonl", "saves.jsonl", "run.log", "exit.json")


def test_pipes_in_place_of_files_hang_nothing(
    overrides: list[str], tmp_path: Path, refused: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    """Without some files a run goes on, and says so; without its lock or a checkpoint's files it is refused."""
    folder = tmp_path / "run"
    words = [*overrides, "checkpoint.every=1"]
    assert train_here([*words, "train.steps=1"]) == 0

    def replace(name: str) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    for name in DISPENSABLE:
        replace(name)
    assert longcat(["report", str(folder)]) == 0
    capfd.readouterr()
    assert run_cleanly(lambda: longcat(["train", *words, "train.steps=2"])) == 0
    assert "metrics.jsonl cannot be written: it is no regular file" in capfd.readouterr().out
    newest = list_checkpoints(folder / "checkpoints")[-1]
    replace(f"checkpoints/{newest.name}/{STATE}")
    refused(["export", f"source={newest}", f"target={tmp_path / 'target'}"], f"{STATE} is missing")
    replace(f"checkpoints/{newest.name}/{MANIFEST}")
    refused(["export", f"source={newest}", f"target={tmp_path / 'target'}"], f"no readable {MANIFEST}")
    replace(".lock")
    refused(["train", *words], ".lock cannot be opened (it is no regular file)")
