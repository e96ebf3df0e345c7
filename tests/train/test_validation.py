"""Validation counts each held-out sample once, also where the split is smaller than a global batch."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch

from tests.support.distributed import run_ranks
from tests.support.running import NARROW
from train.api import build_session, compose
from train.validation import ValidationResult

SMALL = [
    "train.global_batch_size=64",
    "train.sequence_length=64",
    "train.dtype=float32",
    "data.validation_fraction=0.01",
]


def measure(words: Sequence[str]) -> tuple[ValidationResult, float, int]:
    """As the validator, and by one sample after the other; the number of samples."""
    config = compose(*words)
    with build_session(config) as session:
        found = session.validate()
        samples, nats, tokens = session._validator.reader.samples, 0.0, 0
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            for number in range(samples.num_samples):
                window = torch.from_numpy(samples[number])[None]
                every = torch.ones_like(window[:, 1:], dtype=torch.bool)
                with torch.no_grad():
                    losses = session.state.models[0](window[:, :-1], window[:, 1:], every, None, mtp=False)
                nats, tokens = nats + float(losses.lm), tokens + every.numel()
        return found, nats / max(tokens, 1), samples.num_samples


def test_a_split_smaller_than_a_batch_counts_once(overrides: list[str]) -> None:
    """An odd number of samples, so that a micro-batch has a sample that counts and one that does not."""
    found, expected, number = measure([*overrides, *NARROW, *SMALL])
    assert 1 < number < 64 and number % 2, "the case that is meant"
    assert found.loss == pytest.approx(expected, rel=1e-6)
    two = [*overrides, *NARROW, *SMALL, "parallel.fsdp=2"]
    for other, _, _ in run_ranks(measure, 2, two):
        assert other.loss == pytest.approx(expected, rel=1e-6)
        assert other.bits_per_byte == pytest.approx(found.bits_per_byte, rel=1e-6)
