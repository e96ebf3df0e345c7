"""Hopeless runs: which finished runs of a sweep count, and when a run is behind them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longcat.counts import count_parameters
from longcat.json_text import dumps
from tests.support.fixtures import Refused
from train.compose import compose
from train.config import Config
from train.run_dir.folder import as_mapping
from train.sweeps.pruning import Pruner
from train.sweeps.results import SWEEP_FOLDER, Result, read_result, write_result

WORDS = ["model=debug", "pruning.percentile=50", "pruning.min_runs=3", "run.name=s-9"]


def prints_of(config: Config) -> dict[str, str]:
    return {path: f"print of {path}" for path in config.data.paths}


class Sweep:
    """A sweep's folder with finished runs that have one validation, at step 100."""

    def __init__(self, root: Path) -> None:
        self.root, self.folder = root, root / "s-sweep"
        self.folder.mkdir()

    def add(
        self,
        number: int,
        loss: float | str,
        *words: str,
        code: int | None = 0,
        early: bool = False,
        corpora: dict[str, str] | None = None,
    ) -> None:
        run = self.root / f"s-{number}"
        run.mkdir()
        config = compose([*WORDS, f"run.dir={self.root}", f"run.name={run.name}", *words])
        derived = {"derived": {"parameters": count_parameters(config.model).total}}
        prints = {"corpora": prints_of(config) if corpora is None else corpora}
        (run / "config.yaml").write_text(dumps(as_mapping(config) | prints | derived))
        rows = [{"step": 99, "loss": 1.0}, {"step": 100, "loss": 1.0, "val_loss": loss}]
        (run / "metrics.jsonl").write_text("".join(dumps(row) + "\n" for row in rows))
        write_result(self.folder, number, Result(str(run), code, "done", "", [], early))

    def pruner(self, *words: str) -> Pruner:
        config = compose([*WORDS, f"run.dir={self.root}", *words])
        return Pruner(config, {"corpora": prints_of(config)})


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    made = Sweep(tmp_path)
    monkeypatch.setenv(SWEEP_FOLDER, str(made.folder))
    for number, loss in enumerate((2.0, 2.1, 2.6)):
        made.add(number, loss, f"optim.lr={10.0**-number}")
    return made


def test_a_run_above_the_median_ends(sweep: Sweep) -> None:
    pruner = sweep.pruner()
    assert pruner.judge(100, 2.1) == ""
    said = pruner.judge(100, 2.11)
    assert said.startswith("validation loss 2.1100 is above 2.1000, percentile 50 of the 3 finished runs of ")
    assert pruner.judge(100, float("nan"))
    assert sweep.pruner("pruning.percentile=75").judge(100, 2.34) == ""
    assert sweep.pruner("pruning.percentile=75").judge(100, 2.36)


def test_it_waits_for_enough_runs_and_steps(sweep: Sweep) -> None:
    assert sweep.pruner("pruning.min_runs=4").judge(100, 9.0) == ""
    assert sweep.pruner("pruning.min_steps=101").judge(100, 9.0) == ""
    assert sweep.pruner().judge(50, 9.0) == "", "no finished run was validated at step 50"
    assert sweep.pruner("pruning.min_steps=100").judge(100, 9.0)


def test_a_run_that_finishes_meanwhile_counts(sweep: Sweep) -> None:
    pruner = sweep.pruner("pruning.min_runs=4")
    assert pruner.judge(100, 9.0) == ""
    sweep.add(3, 2.2)
    assert pruner.judge(100, 9.0)


def test_only_finished_runs_of_the_same_size_count(sweep: Sweep) -> None:
    sweep.add(3, 0.1, code=None)
    sweep.add(4, 0.1, code=4)
    sweep.add(5, 0.1, early=True)
    sweep.add(6, 0.1, "model.hidden_size=512")
    sweep.add(7, 0.1, "validation.batches=1")
    sweep.add(8, 0.1, "data.paths=[elsewhere]")
    sweep.add(9, 0.1)  # the run itself, in an earlier start
    (sweep.root / "s-10").mkdir()
    write_result(sweep.folder, 10, Result(str(sweep.root / "s-10"), 0, "done", ""))
    assert sweep.pruner().judge(100, 2.1) == ""
    assert "of the 3 finished runs" in sweep.pruner().judge(100, 2.2)


@pytest.mark.parametrize(
    "word", ["data.weights=[1]", "data.validation_fraction=0.5", "data.mask_documents=true", "train.sequence_length=64"]
)
def test_runs_of_other_held_out_text_do_not_count(sweep: Sweep, word: str) -> None:
    sweep.add(3, 0.1, word)
    assert sweep.pruner().judge(100, 2.1) == ""


def test_runs_of_other_lengths_do_not_count(sweep: Sweep) -> None:
    """Stages change the sequences that are validated; other mixtures, rotary bases and equal lengths do not."""
    sweep.add(3, 0.1, "data.stages=[{start_tokens: 1000000, sequence_length: 64}]")
    assert sweep.pruner().judge(100, 2.1) == ""
    sweep.add(4, 2.0, "data.stages=[{start_tokens: 1000000, weights: [2], rope_theta: 5e6}]")
    assert "of the 4 finished runs" in sweep.pruner().judge(100, 9.0)


def test_a_run_from_before_a_key_counts_with_what_it_did_then(sweep: Sweep) -> None:
    path = sweep.root / "s-0" / "config.yaml"
    stored = json.loads(path.read_text())
    del stored["data"]["packing"]
    path.write_text(dumps(stored))
    assert "of the 3 finished runs" in sweep.pruner().judge(100, 9.0)


def test_corpora_are_compared_by_their_contents(sweep: Sweep) -> None:
    (path,) = sweep.pruner().config.data.paths
    sweep.add(3, 0.1, corpora={path: "another"})
    assert sweep.pruner().judge(100, 2.1) == "", "another corpus at the same path"
    sweep.add(4, 0.1, "data.paths=[moved]", corpora={"moved": f"print of {path}"})
    assert "of the 4 finished runs" in sweep.pruner().judge(100, 2.2), "the same corpus at another path"


def test_a_loss_that_is_no_number_does_not_count(sweep: Sweep) -> None:
    sweep.add(3, "low")
    assert "of the 3 finished runs" in sweep.pruner().judge(100, 2.2)


def test_a_result_is_read_once_when_its_run_has_ended(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep.add(3, 2.0, code=4)
    read: list[str] = []

    def reading(path: Path) -> Result:
        read.append(path.name)
        return read_result(path)

    monkeypatch.setattr("train.sweeps.pruning.read_result", reading)
    pruner = sweep.pruner()
    pruner.judge(100, 2.1)
    assert sorted(read) == ["0.json", "1.json", "2.json", "3.json"]
    read.clear()
    pruner.judge(200, 2.1)
    assert read == ["3.json"], "a failed run may start again"


def test_without_a_sweep_or_a_percentile_nothing_ends(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sweep.pruner("pruning.percentile=0").judge(100, 9.0) == ""
    monkeypatch.delenv(SWEEP_FOLDER)
    assert sweep.pruner().judge(100, 9.0) == ""


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["pruning.percentile=100"], "must be below 100"),
        (["pruning.percentile=-1"], "must be below 100"),
        (["pruning.min_runs=0"], "at least 1"),
        (["pruning.min_steps=-1"], "must not be negative"),
        (["pruning.percentile=50", "validation.every=0"], "validation.every=0 measures none"),
    ],
)
def test_wrong_values_are_one_line(words: list[str], part: str, refused: Refused) -> None:
    refused(["train", *words], part)
