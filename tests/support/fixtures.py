"""Fixtures that several folders import: a small corpus, a short run, its checkpoint, and commands that are refused."""

from __future__ import annotations

import email
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.__main__ import main as longcat
from tests.support.exporting import trained
from tests.support.running import VOCAB, tidily
from train.compose import compose
from train.data.build import build

Refused = Callable[..., str]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of a corpus of some of the standard library's sources, vocabulary 512."""
    out = tmp_path_factory.mktemp("corpus")
    text = tmp_path_factory.mktemp("text")
    for number, source in enumerate(sorted(Path(email.__file__).parent.glob("*.py"))):
        (text / f"{number:03}.txt").write_text(source.read_text())
    config = compose([f"data.source={text}", f"data.out={out}", f"model.vocab_size={VOCAB}"])
    build(config.data, VOCAB)
    return out / "corpus"


@pytest.fixture
def overrides(corpus: Path, tmp_path: Path) -> list[str]:
    """A run of seconds: 40 steps of 4 × 32 tokens on a model of two narrow layers."""
    return [
        "model=debug",
        f"model.vocab_size={VOCAB}",
        "model.hidden_size=32",
        "model.ffn_hidden_size=48",
        "model.expert_hidden_size=16",
        f"data.paths=[{corpus}]",
        "train.steps=40",
        "train.sequence_length=32",
        "train.global_batch_size=4",
        "train.micro_batch_size=2",
        "schedule.warmup_steps=5",
        "validation.every=0",
        "validation.documents=0",
        "checkpoint.every=0",
        "logging.hash_every=1",
        "logging.wandb=disabled",
        f"run.dir={tmp_path}",
        "run.name=run",
    ]


@pytest.fixture(scope="session")
def checkpoint(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a run of two steps on ``corpus``."""
    return trained(corpus, tmp_path_factory.mktemp("runs"))


def one_line_of(errors: str, *telling: str) -> str:
    """The one line of ``errors`` that starts with `error: `; it holds all the telling words."""
    said = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, errors
    for word in telling:
        assert word in said[0], f"{word!r} is not in {said[0]!r}"
    return said[0]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs `longcat words…`, checks that it ends in 2 with one telling line on standard error, and returns the line."""

    def run(words: list[str], *telling: str) -> str:
        capfd.readouterr()
        code = tidily(lambda: longcat(words))
        errors = capfd.readouterr().err
        assert code == 2, errors
        said = one_line_of(errors, *telling)
        assert errors == f"{said}\n"
        return said

    return run
