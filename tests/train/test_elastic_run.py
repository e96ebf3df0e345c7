"""A run with `train.elastic_bits` that changes its number of ranks at a resume equals one that never changed it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support.running import NARROW, exact, lines, train_here, train_two


def test_run_continues_on_half_of_its_ranks(overrides: list[str], tmp_path: Path) -> None:
    """Six steps on two ranks, the rest on one: losses, norms, state hashes, validation losses."""
    words = [*overrides, *NARROW, "train.elastic_bits=2", "train.steps=10", "logging.hash_every=1"]
    words += ["validation.every=5", "validation.batches=1", f"run.dir={tmp_path / 'runs'}"]
    halved, whole = [*words, "run.name=halved"], [*words, "run.name=whole"]
    assert train_two([*halved, "train.steps=6"]) == [0]
    assert train_here(halved) == 0 and train_here(whole) == 0
    one, other = (tmp_path / "runs" / name for name in ("halved", "whole"))
    assert exact(one) == exact(other) and len(exact(one)) == 10
    assert "state_hash" in exact(one)[1]
    assert [line["val_loss"] for line in lines(one) if "val_loss" in line][-1] == lines(other)[-1]["val_loss"]


def test_another_dtype_is_refused(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`train.dtype=auto` is compared once the device has decided it."""
    words = [*overrides, *NARROW, "train.elastic_bits=2", f"run.dir={tmp_path}", "run.name=here"]
    monkeypatch.setattr("train.run.fastest_dtype", lambda: torch.float32)
    assert train_here([*words, "train.steps=1"]) == 0
    monkeypatch.setattr("train.run.fastest_dtype", lambda: torch.bfloat16)
    capsys.readouterr()
    assert train_here([*words, "train.steps=2"]) == 2
    assert "train.dtype was float32 and is now bfloat16" in capsys.readouterr().err
