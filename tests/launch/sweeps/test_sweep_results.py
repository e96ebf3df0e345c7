"""What a sweep makes of its runs' ends: diverged runs, models that are not compared, losses of a wrong type."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import launch.sweeps.sweep
from launch.sweeps.sweep import best_run, final_loss, run_sweep
from longcat.errors import ConfigError
from train.sweeps.results import Result, results, write_result


def test_a_diverged_run_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sweep shows its code and has finished; one that was stopped beside it begins again, the diverged one not."""
    started: list[float] = []
    codes = {1e-3: 0, 1.0: 4, 3e-3: 3}

    def train(tree: Any, overrides: list[str]) -> tuple[int, str]:
        started.append(tree.optim.lr)
        folder = Path(tree.run.dir) / tree.run.name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 5.0}) + "\n")
        return codes[tree.optim.lr], "ended"

    monkeypatch.setattr(launch.sweeps.sweep, "train", train)
    words = [f"run.dir={tmp_path}", "run.name=rates", "model=debug", "optim.lr=1e-3,1.0,3e-3"]
    folder = tmp_path / "rates-sweep"
    assert run_sweep(words) == 4 and started == [1e-3, 1.0, 3e-3]
    assert json.loads((folder / "sweep.json").read_text())["finished"] is False
    started.clear()
    codes[3e-3] = 0
    assert run_sweep(words) == 4 and started == [3e-3]
    assert json.loads((folder / "sweep.json").read_text())["finished"] is True
    assert [result.code for result in results(folder)] == [0, 4, 0]


def test_runs_of_several_models_are_not_compared(tmp_path: Path) -> None:
    """The best run of each is named; initial scales do not make another model."""
    sweep = tmp_path / "widths-sweep"
    sweep.mkdir()
    sizes = [(64, 0.02, 5.0), (64, 0.01, 4.5), (128, 0.02, 4.0)]
    for number, (width, scale, loss) in enumerate(sizes):
        run = tmp_path / f"widths-{number}"
        run.mkdir()
        (run / "config.yaml").write_text(f"model: {{hidden_size: {width}, init_std: {scale}}}\n")
        (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss}) + "\n")
        if number < 2:
            write_result(sweep, number, Result(str(run), 0, "done", ""))
    assert best_run(sweep) == tmp_path / "widths-1"
    write_result(sweep, 2, Result(str(tmp_path / "widths-2"), 0, "done", ""))
    with pytest.raises(ConfigError, match="2 models") as caught:
        best_run(sweep)
    assert "widths-2 (model.hidden_size=128)" in str(caught.value)
    assert "widths-1 (model.hidden_size=64)" in str(caught.value)


@pytest.mark.parametrize("wrong", ["low", None, True, [1.0], {}], ids=str)
def test_a_loss_of_a_wrong_type_is_none(wrong: object, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "val_loss": wrong, "loss": 5}) + "\n")
    assert final_loss(tmp_path) == 5.0
    path.write_text(json.dumps({"step": 1, "val_loss": wrong}) + "\n")
    assert final_loss(tmp_path) == math.inf
