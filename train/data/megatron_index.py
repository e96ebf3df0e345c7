"""What megatron-core builds: the index of an epoch's samples, and the writer of a corpus. Its import takes a second."""

from __future__ import annotations

import logging
from typing import Any, ClassVar

import numpy as np

from train.data.megatron import GPTDataset, GPTDatasetConfig, IndexedDataset, IndexedDatasetBuilder, Split

# It warns for each data set without a cache of megatron's own kind; `train/data/epochs.py` has another one.
logging.getLogger(GPTDataset.__module__).setLevel(logging.ERROR)


class NoPadding:
    """The part of a tokenizer that GPTDataset uses: no id is padding, so none is rewritten."""

    vocab_size = None
    eod, pad = -1, -(1 << 62)
    unique_identifiers: ClassVar[dict[str, Any]] = {}


def build_index(
    prefix: str, sequences: np.ndarray, sequence_length: int, seed: int, is_training: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The samples of one epoch of the given sequences of a corpus.

    Returns the sequences in the order of the epoch [sequences]; where each sample starts, and the last one ends, as
    (place in that order, token in the sequence) [samples + 1, 2]; the shuffled order of the samples [samples].
    """
    # Without a blend in its configuration megatron reads the given data set and keeps no cache.
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=sequence_length,
        tokenizer=NoPadding(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    split = Split.train if is_training else Split.valid
    built = GPTDataset(IndexedDataset(prefix), prefix, sequences, None, split, config)
    return built.document_index, built.sample_index, built.shuffle_index


def megatron_builder(path: str, dtype: type[np.number[Any]]) -> IndexedDatasetBuilder:
    """The writer of a `.bin`/`.idx` pair."""
    return IndexedDatasetBuilder(path, dtype=dtype)
