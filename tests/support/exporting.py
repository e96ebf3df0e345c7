"""A small trained checkpoint with a tokenizer, and comparisons for the tests of exports and imports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.peer import peer_model, peer_tensors
from launch.__main__ import main as longcat
from longcat.config import ModelConfig
from longcat.model import LongCat
from tests.support.running import VOCAB, train_here
from train.checkpoint.offline_reader import Checkpoint, full_box, load_model, stored_shapes

# 2 steps of a narrow model, so that weights, biases and moments are no longer initial
SMALL = [
    "model=debug",
    f"model.vocab_size={VOCAB}",
    "model.hidden_size=32",
    "model.ffn_hidden_size=48",
    "model.expert_hidden_size=16",
    "model.embedding_std=1",
    "model.hidden_std=0.15",
    "train.dtype=float32",
    "train.steps=2",
    "train.sequence_length=32",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "schedule.warmup_steps=0",
    "optim.lr=0.01",
    "validation.every=0",
    "validation.documents=0",
    "checkpoint.every=0",
    "logging.hash_every=1",
    "logging.wandb=disabled",
    "run.num_processes=1",
]


def trained(corpus: Path, folder: Path, *changes: str) -> Path:
    """The checkpoint of a short run."""
    words = [*SMALL, f"data.paths=[{corpus}]", f"run.dir={folder}", "run.name=run", *changes]
    assert train_here(words) == 0
    return folder / "run" / "checkpoints" / "step-00000002"


def run_command(*words: str) -> None:
    """Run `longcat words…`, which must end with code 0."""
    assert longcat(list(words)) == 0


def weights(folder: Path) -> dict[str, Tensor]:
    """All weights and biases of a checkpoint by stored name."""
    source = Checkpoint(folder)
    return {name: source.read(name, shape, full_box(shape)) for name, shape in stored_shapes(source.model)}


def our_logits(folder: Path, tokens: Tensor) -> Tensor:
    source = Checkpoint(folder)
    return loaded(source.model, source).logits(tokens)


def loaded(config: ModelConfig, source: Any) -> LongCat:
    return load_model(config, source, torch.float32, torch.device("cpu"))


def some_tokens() -> Tensor:
    return torch.randint(VOCAB, (3, 24), generator=torch.Generator().manual_seed(0))


def assert_close(got: Tensor, expected: Tensor, tolerance: float = 2e-5) -> None:
    """The largest difference is at most ``tolerance`` of the largest value."""
    difference = float((got - expected).detach().abs().max() / expected.detach().abs().max())
    assert difference <= tolerance, f"{difference:.1e} of the largest logit"


@torch.no_grad()
def peer_of(config: ModelConfig, tensors: dict[str, Tensor]) -> nn.Module:
    """The transformers model with ``tensors`` by their released names; none may be missing."""
    peer: nn.Module = peer_model(config, attention="eager")
    for name, target in peer_tensors(peer, config):
        target.copy_(tensors[name])
    return peer
