"""A small corpus of real text, and the overrides of a run that takes a second."""

from __future__ import annotations

import email
from pathlib import Path

import pytest

from train.compose import compose
from train.data.build import build

VOCAB = 512


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
