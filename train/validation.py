"""Validation loss, bits per byte, n-gram baselines, and which tokens of a real text use how many FFN experts."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from parallel.mesh import Topology
from parallel.reduce import sum_scalars
from train.batches import BatchReader
from train.config import Config
from train.data.samples import TokenSamples
from train.data.tokens import load_tokenizer, pieces, token_byte_lengths, tokenizer_path
from train.ngram import kneser_ney
from train.state import TrainState

MAX_BASELINE_TOKENS = 20_000_000  # more would take the n-gram models minutes


@dataclass(frozen=True)
class ValidationResult:
    """Mean nats a token, and bits a byte of text where the tokenizer is at hand."""

    loss: float
    bits_per_byte: float | None


class Validator:
    """Measures the state on the first samples of the validation split, the same ones each time."""

    def __init__(self, samples: TokenSamples, config: Config, topology: Topology) -> None:
        self.reader = BatchReader(samples, config, topology)
        self.config = config
        path = tokenizer_path(config.data)
        self.tokenizer = None if path is None else load_tokenizer(path)
        lengths = None if path is None else token_byte_lengths(path, config.model.vocab_size)
        self.byte_lengths = None if lengths is None else torch.from_numpy(lengths).to(topology.device)

    @property
    def num_samples(self) -> int:
        """Whole global batches, no more than the split has: none is counted twice."""
        size = self.config.train.global_batch_size
        whole = max(1, self.reader.samples.num_samples // size)
        return min(self.config.validation.batches, whole) * size

    @torch.no_grad()
    def measure(self, state: TrainState) -> ValidationResult:
        """A collective of all ranks."""
        nats, tokens, text_bytes = 0.0, 0.0, 0.0
        for first in range(0, self.num_samples, self.config.train.global_batch_size):
            for batch in self.reader.read(first):
                losses = state.model(batch.tokens, batch.labels, batch.valid, batch.documents, mtp=False)
                nats += float(losses.lm)
                tokens += float(batch.valid.sum())
                if self.byte_lengths is not None:
                    text_bytes += float(self.byte_lengths[batch.labels[batch.valid]].sum())
        nats, tokens, text_bytes = sum_scalars([nats, tokens, text_bytes])
        bits = nats / math.log(2) / text_bytes if text_bytes else None
        return ValidationResult(nats / tokens, bits)

    def baselines(self, train_samples: TokenSamples, seen_samples: int) -> dict[str, float] | None:
        """n-gram models of exactly the samples that were trained on, on exactly the validation labels."""
        if seen_samples * self.config.train.sequence_length > MAX_BASELINE_TOKENS:
            return None
        return kneser_ney(
            (train_samples[index] for index in range(seen_samples)),
            (self.reader.samples[index] for index in range(self.num_samples)),
            self.config.model.vocab_size,
        )

    @torch.no_grad()
    def colour_documents(self, state: TrainState) -> list[dict[str, list[str] | list[float]]]:
        """Pieces of validation documents and the FFN experts that each token used.

        As a mean over layers; a collective.
        """
        if self.tokenizer is None:
            return []
        length = self.config.train.sequence_length
        documents = []
        for ids in self.reader.samples.validation_documents(self.config.validation.documents):
            window = np.asarray(ids[:length], dtype=np.int64)
            padded = np.zeros(length + 1, dtype=np.int64)
            padded[: len(window)] = window
            batch = self.reader.to_batch(torch.from_numpy(padded)[None])
            losses = state.model(batch.tokens, batch.labels, batch.valid, batch.documents, mtp=False)
            used = losses.ffn_experts[:, 0, : len(window)].double().mean(0)
            documents.append({"pieces": pieces(self.tokenizer, window), "ffn_experts": used.tolist()})
        return documents


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
