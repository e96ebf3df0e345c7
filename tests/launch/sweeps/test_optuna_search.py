"""`hydra/sweeper=optuna`: values from the losses of earlier runs, and a search that goes on where it was stopped."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main as longcat
from tests.support.fixtures import Refused
from train.sweeps.results import results

Loss = Callable[[Any], float]
RATE = "optim.lr=tag(log,interval(1e-5,1e-1))"


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Start a search whose runs have the loss of a function of their configuration, or its negative exit code."""

    def start(loss: Loss, *words: str) -> int:
        def train(tree: Any, overrides: list[str]) -> tuple[int, str]:
            started.append(tree.run.name)
            folder = Path(tree.run.dir) / tree.run.name
            folder.mkdir(exist_ok=True)
            value = loss(tree)
            (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": value}) + "\n")
            return (int(-value), "failed") if value < 0 else (0, "")

        monkeypatch.setattr("launch.sweeps.sweep.train", train)
        return longcat(["train", "-m", "hydra/sweeper=optuna", f"run.dir={tmp_path}", "run.name=found", *words])

    started: list[str] = []
    start.started = started  # type: ignore[attr-defined]
    return start


def values(folder: Path, key: str) -> list[Any]:
    return [result.settings()[key] for result in results(folder)]


def distance(tree: Any) -> float:
    """Lowest at a rate of 3e-2; 1.6 above it on average for rates at random."""
    return 1 + abs(math.log10(tree.optim.lr / 3e-2))


def test_later_values_come_closer_to_the_best(
    search: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [RATE, "hydra.sweeper.n_trials=16", "hydra.sweeper.n_startup_trials=6"]
    assert search(distance, *words) == 0
    rates = values(tmp_path / "found-sweep", "optim.lr")
    away = [abs(math.log10(rate / 3e-2)) for rate in rates]
    assert len(set(rates)) == 16
    assert sum(away[-6:]) / 6 < 0.8, "the sampler does not learn from losses"
    assert f"lowest of 16 losses: {1 + min(away):.4f} in " in capsys.readouterr().out


def test_a_stopped_search_goes_on_with_the_same_values(search: Callable[..., int], tmp_path: Path) -> None:
    """It ends with the values of a search that was never stopped, and no finished run is started again."""
    words = [RATE, "train.seed=range(0,9,2)", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_startup_trials=2"]
    assert search(distance, *words) == 0
    whole = values(tmp_path / "found-sweep", "optim.lr")
    assert set(values(tmp_path / "found-sweep", "train.seed")) <= {0, 2, 4, 6, 8}
    search.started.clear()  # type: ignore[attr-defined]
    stops = [*words, "train.steps=7"]
    assert search(lambda tree: -3.0 if tree.run.name == "found-3" else distance(tree), *stops) == 3
    assert search.started == [f"found-{number}" for number in range(4)]  # type: ignore[attr-defined]
    search.started.clear()  # type: ignore[attr-defined]
    assert search(distance, *stops) == 0
    assert search.started == ["found-3", "found-4", "found-5"]  # type: ignore[attr-defined]
    assert values(tmp_path / "found-sweep-2", "optim.lr") == whole


def test_failed_runs_do_not_end_a_search(search: Callable[..., int], tmp_path: Path) -> None:
    """Nor does a loss that is not finite; runs of a batch are proposed together."""
    codes = {"found-0": -1.0, "found-1": -4.0}
    words = ["optim.lr=choice(1e-3,2e-3,4e-3)", "train.steps=int(interval(5,9))", "hydra.sweeper.n_trials=5"]
    assert search(lambda tree: codes.get(tree.run.name, 2.0), *words, "hydra.sweeper.n_jobs=2") == 1
    folder = tmp_path / "found-sweep"
    assert [result.code for result in results(folder)] == [1, 4, 0, 0, 0]
    assert set(values(folder, "optim.lr")) <= {1e-3, 2e-3, 4e-3}
    assert all(isinstance(steps, int) and 5 <= steps <= 9 for steps in values(folder, "train.steps"))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["optim.lr=1e-3"], "has nothing to search"),
        ([RATE, "hydra.sweeper.sampler=grid"], "hydra.sweeper.sampler=grid is no sampler; use tpe, random, gp"),
        ([RATE, "hydra.sweeper.n_trials=0"], "hydra.sweeper.n_trials=0 must be at least 1"),
        ([RATE, "hydra.sweeper.trials=5"], "trials"),
        (["optim.lr=tag(log,interval(0,1))"], "two numbers above 0"),
        (["optim.lr=interval(2,1)"], "two numbers, the smaller one first"),
        (["optim.lr=interval(1e-3,inf)"], "two numbers, the smaller one first"),
        (["train.seed=range(5,5)"], "has no values"),
        (["train.steps=choice(2,abc)"], "abc"),
        ([RATE, "optim.lr=choice(1e-3,fast)"], "fast"),
    ],
)
def test_wrong_searches_are_one_line(words: list[str], part: str, refused: Refused, tmp_path: Path) -> None:
    refused(["train", "-m", "hydra/sweeper=optuna", f"run.dir={tmp_path}/new", *words], part)
    assert not (tmp_path / "new").exists()


def test_a_job_that_a_launcher_lost_does_not_end_a_search(
    search: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As submitit raises for a job that was killed: the rest of the batch has results, and more runs follow."""
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    plain = BasicLauncher.launch

    def launch(self: Any, batch: Any, initial_job_idx: int) -> Any:
        found = plain(self, batch, initial_job_idx)
        if initial_job_idx == 2:
            (tmp_path / "found-sweep" / "3.json").unlink()
            raise RuntimeError("job 3 was killed")
        return found

    monkeypatch.setattr(BasicLauncher, "launch", launch)
    assert search(distance, RATE, "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=2") == 1
    assert search.started == [f"found-{number}" for number in range(6)]  # type: ignore[attr-defined]
    assert "job 3 was killed" in capfd.readouterr().err


def test_a_launcher_that_starts_nothing_ends_a_search(
    search: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from hydra._internal.core_plugins.basic_launcher import BasicLauncher

    calls: list[int] = []

    def launch(self: Any, batch: Any, initial_job_idx: int) -> Any:
        calls.append(initial_job_idx)
        raise RuntimeError("no such partition")

    monkeypatch.setattr(BasicLauncher, "launch", launch)
    assert search(distance, RATE, "hydra.sweeper.n_trials=6") == 1
    assert calls == [0] and "no such partition" in capfd.readouterr().err


def test_a_later_word_for_a_key_counts(search: Callable[..., int], tmp_path: Path) -> None:
    words = [RATE, "++optim.lr=0.5", "train.seed=choice(1,2)", "hydra.sweeper.n_trials=2"]
    assert search(lambda tree: tree.optim.lr, *words) == 0
    assert set(values(tmp_path / "found-sweep", "optim.lr")) == {0.5}


def test_gaussian_processes_need_scipy(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    words = ["train", "-m", "hydra/sweeper=optuna", f"run.dir={tmp_path}", RATE, "hydra.sweeper.sampler=gp"]
    refused(words, "needs the package scipy")


def test_without_optuna(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setitem(sys.modules, "optuna.distributions", None)
    refused(["train", "-m", "hydra/sweeper=optuna", f"run.dir={tmp_path}", RATE], "needs the package optuna")
