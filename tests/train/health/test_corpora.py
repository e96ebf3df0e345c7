"""Validation by corpus: its figures, and the line about a corpus whose loss rises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.corpora import write_corpus
from tests.support.fixtures import Refused
from tests.support.running import lines, train_here, train_two
from train.api import build_session, compose
from train.data.names import corpus_names
from train.health.corpora import CorpusWatch
from train.health.events import EventKind


@pytest.mark.parametrize(
    ("prefixes", "names"),
    [
        (["data/web/corpus", "/x/code"], ["web", "code"]),
        (["a/web/corpus", "b/web/corpus", "code/corpus"], ["a-web", "b-web", "code"]),
        (["x/a/web", "y/a/web"], ["x-a-web", "y-a-web"]),
        (["corpus", "web/corpus"], ["corpus", "web"]),
        (["web/corpus", "web/corpus"], ["web-0", "web-1"]),
    ],
)
def test_corpora_have_different_names(prefixes: list[str], names: list[str]) -> None:
    assert corpus_names(prefixes) == names


def kinds(watch: CorpusWatch, losses: list[float]) -> list[str]:
    found = [watch.see(step, {"web": 1.0, "code": loss}, 2.0 - step / 100) for step, loss in enumerate(losses)]
    return ["".join(str(event.kind) for event in events) for events in found]


def test_a_worse_corpus_is_told_once_until_it_recovers() -> None:
    worse, recovered = str(EventKind.corpus_worse), str(EventKind.corpus_recovered)
    found = kinds(CorpusWatch(0.1), [3.0, 2.0, 2.05, 2.2, 2.3, 2.05, 2.4, float("nan"), 1.9, 1.95])
    assert found == ["", "", "", worse, "", recovered, worse, "", recovered, ""]
    assert kinds(CorpusWatch(0.0), [3.0, 2.0, 9.0]) == ["", "", ""]


def test_the_line_names_both_losses_and_what_the_mean_did() -> None:
    watch = CorpusWatch(0.1)
    watch.see(10, {"code": 2.0}, 2.5)
    (event,) = watch.see(20, {"code": 2.25}, 2.4)
    assert "step 20: the validation loss of code is 2.2500, and was 2.0000 at step 10" in event.text
    assert "that of all corpora fell by 0.1000" in event.text and "\n" not in event.text


@pytest.fixture
def two(overrides: list[str], tmp_path: Path) -> list[str]:
    """A run on two corpora, of which the second gets nearly no training and shares no id with the first."""
    draw = np.random.default_rng(0)
    for name, first in (("first", 5), ("second", 300)):
        documents = [np.append(draw.integers(first, first + 20, size=200), 0) for _ in range(40)]
        write_corpus(tmp_path / name / "corpus", documents)
    paths = ",".join(str(tmp_path / name / "corpus") for name in ("first", "second"))
    words = [word for word in overrides if not word.startswith(("data.paths", "validation.every"))]
    words += [f"data.paths=[{paths}]", "data.weights=[0.99,0.01]", "data.validation_fraction=0.2", "train.steps=12"]
    return [*words, "validation.every=3", "validation.batches=2", "optim.lr=0.02", "train.dtype=float32"]


def events(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (folder / "health.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == "corpus_worse"]


def test_a_run_warns_of_a_worse_corpus_and_says_it_once(two: list[str], tmp_path: Path) -> None:
    """The mean falls; a second start remembers what the first one said."""
    assert train_here(two) == 0
    rows = [row for row in lines(tmp_path / "run") if "val_loss" in row]
    assert all({"val_loss/first", "val_loss/second"} <= row.keys() for row in rows)
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    assert [event["corpus"] for event in events(tmp_path / "run")] == ["second"]
    log = (tmp_path / "run" / "run.log").read_text()
    assert log.count("the validation loss of second is") == 1 and "first " in log
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Validation loss by corpus" in page and "above its lowest on second" in page
    assert train_here([*two, "train.steps=15"]) == 0
    assert len(events(tmp_path / "run")) == 1


def test_loss_of_a_corpus_is_that_of_a_run_on_it_alone(two: list[str], tmp_path: Path) -> None:
    """Bitwise; and the loss over all corpora does not depend on it."""
    with build_session(compose(*two)) as session:
        both = session.validate()
    with build_session(compose(*two, "validation.corpus_batches=0", "run.name=plain")) as session:
        plain = session.validate()
    assert plain.loss == both.loss and plain.by_corpus == {}
    alone = [word for word in two if not word.startswith(("data.paths", "data.weights"))]
    for name in ("first", "second"):
        words = [*alone, f"data.paths=[{tmp_path / name / 'corpus'}]", f"run.name={name}"]
        with build_session(compose(*words)) as session:
            found = session.validate()
        assert found.loss == both.by_corpus[name] and found.by_corpus == {}


def test_two_ranks_measure_the_same_loss_of_each_corpus(two: list[str], tmp_path: Path) -> None:
    words = [*two, "train.steps=3"]
    assert train_here(words) == 0
    assert train_two([*words, "run.name=ranks", "run.num_processes=2", "parallel.ep=2"]) == [0]
    one, ranks = lines(tmp_path / "run")[-1], lines(tmp_path / "ranks")[-1]
    for name in ("first", "second"):
        assert ranks[f"val_loss/{name}"] == pytest.approx(one[f"val_loss/{name}"], rel=1e-5)


def test_negative_limits_are_refused(refused: Refused) -> None:
    refused(["train", "validation.worse_by=-1"], "validation.worse_by=-1", "must not be negative")
