"""Fixtures that several folders import: a corpus, a short run, its checkpoint, commands that are refused, Ctrl-C."""

from __future__ import annotations

import email
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.__main__ import main as longcat
from tests.support.exporting import trained
from tests.support.running import VOCAB, run_cleanly
from train.compose import compose
from train.data.build import build

Refused = Callable[..., str]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path prefix of a corpus of standard library sources, vocabulary 512."""
    out = tmp_path_factory.mktemp("corpus")
    text = tmp_path_factory.mktemp("text")
    for number, source in enumerate(sorted(Path(email.__file__).parent.glob("*.py"))):
        (text / f"{number:03}.txt").write_text(source.read_text())
    config = compose([f"data.source={text}", f"data.out={out}", f"model.vocab_size={VOCAB}"])
    build(config.data, VOCAB)
    return out / "corpus"


@pytest.fixture
def overrides(corpus: Path, tmp_path: Path) -> list[str]:
    """A run that takes seconds: 40 steps of 4 × 32 tokens on two narrow layers."""
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


def error_line(errors: str, *parts: str) -> str:
    """The only line of ``errors`` that starts with `error: `; it must contain all ``parts``."""
    found = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(found) == 1, errors
    for part in parts:
        assert part in found[0], f"{part!r} is not in {found[0]!r}"
    return found[0]


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Refused:
    """Runs `longcat words…`, which must end with code 2 and one line on standard error with ``parts``; returns it."""

    def run(words: list[str], *parts: str) -> str:
        capfd.readouterr()
        code = run_cleanly(lambda: longcat(words))
        errors = capfd.readouterr().err
        assert code == 2, errors
        line = error_line(errors, *parts)
        assert errors == f"{line}\n"
        return line

    return run


@pytest.fixture
def heeds_ctrl_c() -> Iterator[None]:
    """A shell starts what it puts in the background with SIGINT ignored, the tests too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
