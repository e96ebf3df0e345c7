"""Validation loss, bits per byte, n-gram baselines, and FFN experts per token of validation text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from parallel.elastic import sum_exactly
from parallel.mesh import Axis, Topology
from parallel.reduce import sum_over_ranks, sum_scalars
from train.batches import BatchReader
from train.config import Config
from train.data.names import corpus_names
from train.data.samples import TokenSamples
from train.data.tokens import load_tokenizer, pieces, token_byte_lengths, tokenizer_path
from train.health.ranges import SampleRanges
from train.ngram import kneser_ney
from train.state import TrainState

MAX_BASELINE_TOKENS = 20_000_000  # more would take the n-gram models minutes


@dataclass(frozen=True)
class ValidationResult:
    """Mean nats per token, and bits per byte of text if the tokenizer is known."""

    loss: float
    bits_per_byte: float | None
    by_corpus: dict[str, float] = field(default_factory=dict)  # nats per token of each, where there are several


class Validator:
    """Measures the state on the first samples of the validation split, the same ones each time."""

    def __init__(self, samples: TokenSamples, config: Config, topology: Topology) -> None:
        self.samples, self.topology = samples, topology
        self.use(config, samples)
        path = tokenizer_path(config.data)
        self.tokenizer = None if path is None else load_tokenizer(path)
        lengths = None if path is None else token_byte_lengths(path, config.model.vocab_size)
        self.byte_lengths = None if lengths is None else torch.from_numpy(lengths).to(topology.device)

    def use(self, config: Config, samples: TokenSamples | None = None) -> None:
        """Measure with the configuration of a stage from now on: in windows of its length."""
        self.config = config
        if samples is None:
            samples = self.samples.of_length(config.train.sequence_length)
        self.reader = BatchReader(samples, config, self.topology)
        names = corpus_names(config.data.paths)
        several = len(names) > 1 and config.validation.corpus_batches > 0
        length = config.train.sequence_length
        alone = [samples.of_corpus(number, length) for number in range(len(names)) if several]
        self.by_corpus = {
            name: BatchReader(one, config, self.topology)
            for name, one in zip(names, alone, strict=False)
            if one.num_samples  # else it is shorter than a sample, and has no share in the mixture
        }

    @property
    def num_samples(self) -> int:
        """Samples of a measurement over all corpora."""
        return self._full_batches(self.reader, self.config.validation.batches)

    def _full_batches(self, reader: BatchReader, batches: int) -> int:
        """Samples of full global batches, at most as many as the split has; of one that has fewer samples, all."""
        size, there = self.config.train.global_batch_size, reader.samples.num_samples
        return min(batches, there // size) * size or there

    def measure(self, state: TrainState) -> ValidationResult:
        """Validation loss, of each corpus too, and bits per byte; a collective of all ranks."""
        nats, tokens, text_bytes = self._sums(state, self.reader, self.num_samples)
        bits = nats / math.log(2) / text_bytes if text_bytes else None
        by_corpus = {}
        for name, reader in self.by_corpus.items():
            samples = self._full_batches(reader, self.config.validation.corpus_batches)
            nats_of_corpus, tokens_of_corpus, _ = self._sums(state, reader, samples)
            by_corpus[name] = nats_of_corpus / tokens_of_corpus
        return ValidationResult(nats / tokens, bits, by_corpus)

    def _sums(self, state: TrainState, reader: BatchReader, num_samples: int) -> tuple[float, float, float]:
        """Nats, labels and bytes of their text over the first samples of a reader, of all ranks; each counts once."""
        nats, tokens, text_bytes = 0.0, 0.0, 0.0
        by_micro_batch: list[float] = []
        for first in range(0, num_samples, self.config.train.global_batch_size):
            batches = reader.read_first(first, num_samples)
            for losses_of_part in state.engine.evaluate(batches):
                by_micro_batch += (found := [float(losses.lm) for losses in losses_of_part])
                nats += sum(found)
            for batch in batches:
                tokens += float(batch.valid.sum())
                if self.byte_lengths is not None:
                    text_bytes += float(self.byte_lengths[batch.labels[batch.valid]].sum())
        if self.topology.coordinate(Axis.TP):  # TP ranks share the vocabulary: the first one counts the loss
            nats, by_micro_batch = 0.0, [0.0] * len(by_micro_batch)
        if self.config.train.elastic_bits:
            nats = float(sum_exactly(torch.tensor(by_micro_batch, dtype=torch.float64)[:, None]))
        if not self.topology.reads_first:
            tokens, text_bytes = 0.0, 0.0
        nats, tokens, text_bytes = sum_scalars([nats, tokens, text_bytes])
        return nats, tokens, text_bytes

    def baselines(
        self, train_samples: TokenSamples, seen_samples: int, seen_tokens: int, left_out: SampleRanges
    ) -> dict[str, float] | None:
        """Loss of n-gram models of the samples trained on, on the validation labels; None if they have too many tokens.

        ``seen_tokens`` is how many.
        """
        if seen_tokens > MAX_BASELINE_TOKENS:
            return None
        return kneser_ney(
            (text for index in range(seen_samples) for text in train_samples.texts(left_out.place(index))),
            (text for index in range(self.num_samples) for text in self.reader.samples.texts(index)),
            self.config.model.vocab_size,
        )

    def documents_by_experts(self, state: TrainState) -> list[dict[str, list[str] | list[float]]]:
        """Token texts of validation documents, and the FFN experts per token (mean over layers); a collective."""
        if self.tokenizer is None:
            return []
        length = self.config.train.sequence_length
        documents = []
        for ids in self.reader.samples.validation_documents(self.config.validation.documents):
            window = np.asarray(ids[:length], dtype=np.int64)
            padded = np.zeros(length + 1, dtype=np.int64)
            padded[: len(window)] = window
            used = self._ffn_experts(state, torch.from_numpy(padded)[None])[: len(window)]
            documents.append({"pieces": pieces(self.tokenizer, window), "ffn_experts": used.tolist()})
        return documents

    def _ffn_experts(self, state: TrainState, window: Tensor) -> Tensor:
        """FFN experts of each token [S] of one window [1, S + 1], mean over layers; every data rank reads the same."""
        batches = [self.reader.to_batch(window.expand(self.reader.size, -1))]  # a pipeline needs its batch shape
        used = torch.zeros(window.shape[1] - 1, dtype=torch.float64)
        if self.topology.data_rank == 0:
            for model, losses in zip(state.models, state.engine.evaluate(batches), strict=True):
                used[model.sequence.positions(len(used))] += losses[0].ffn_experts[:, 0].double().sum(0).cpu()
        else:
            state.engine.evaluate(batches)
        return sum_over_ranks(used) / self.config.model.num_layers
