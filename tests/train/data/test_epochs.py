"""Windows of a corpus without megatron's reader: the same as megatron's own data set gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.corpora import unique_documents, write_corpus
from train.data.epochs import CorpusReader
from train.data.megatron import GPTDataset, GPTDatasetConfig, IndexedDataset, Split
from train.data.megatron_index import _NoPadding


@pytest.mark.parametrize("sequences_each", [1, 3])
def test_windows_equal_those_of_megatron(tmp_path: Path, sequences_each: int) -> None:
    """Two epochs; documents of one sequence, and of several, some of them without tokens."""
    prefix = write_corpus(tmp_path / "c" / "corpus", unique_documents(40, 7), sequences_each)
    reader = CorpusReader(
        prefix,
        sequence_length=10,
        seed=3,
        split="train",
        validation_fraction=0.1,
        cache_dirs=[tmp_path / "index"],
        info=None,
    )
    for epoch in (0, 1):
        config = GPTDatasetConfig(
            random_seed=3 + epoch,
            sequence_length=10,
            tokenizer=_NoPadding(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        theirs = GPTDataset(IndexedDataset(prefix), prefix, reader._sequences, None, Split.train, config)
        assert len(theirs) >= reader.samples_per_epoch > 20
        for number in range(reader.samples_per_epoch):
            item = theirs[number]
            ours = reader.sample(epoch * reader.samples_per_epoch + number)
            assert ours.dtype == np.int64
            np.testing.assert_array_equal(ours[:-1], item["tokens"].numpy())
            np.testing.assert_array_equal(ours[1:], item["labels"].numpy())
