"""Windows of a corpus without megatron's reader: the same as megatron's own data set gives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.support.corpora import unique_documents, write_corpus
from train.data.epochs import SPLIT_SEED, SPLITS, CorpusReader, SplitName
from train.data.megatron import GPTDataset, GPTDatasetConfig, IndexedDataset, Split
from train.data.megatron_index import NoPadding
from train.data.packed import PackedReader


def open_reader(
    kind: type[CorpusReader], prefix: str, folder: Path, split: SplitName = "train", held_out: float = 0.1
) -> CorpusReader:
    """Samples of 10 tokens, with their index below ``folder``."""
    return kind(
        prefix,
        sequence_length=10,
        seed=3,
        split=split,
        validation_fraction=held_out,
        cache_dirs=[folder / "index"],
        info=None,
    )


@pytest.mark.parametrize("sequences_each", [1, 3])
def test_windows_equal_those_of_megatron(tmp_path: Path, sequences_each: int) -> None:
    """Two epochs; documents of one sequence, and of several, some of them without tokens."""
    prefix = write_corpus(tmp_path / "c" / "corpus", unique_documents(40, 7), sequences_each)
    reader = open_reader(CorpusReader, prefix, tmp_path)
    for epoch in (0, 1):
        config = GPTDatasetConfig(
            random_seed=3 + epoch,
            sequence_length=10,
            tokenizer=NoPadding(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        theirs = GPTDataset(IndexedDataset(prefix), prefix, reader._sequences(), None, Split.train, config)
        assert len(theirs) >= reader.samples_per_epoch > 20
        for number in range(reader.samples_per_epoch):
            item = theirs[number]
            ours = reader.sample(epoch * reader.samples_per_epoch + number)
            assert ours.dtype == np.int64
            np.testing.assert_array_equal(ours[:-1], item["tokens"].numpy())
            np.testing.assert_array_equal(ours[1:], item["labels"].numpy())


@pytest.mark.parametrize("reader_type", [CorpusReader, PackedReader])
def test_ranks_share_what_grows_with_the_corpus(tmp_path: Path, reader_type: type[CorpusReader]) -> None:
    """Once an index is written, a reader keeps no array of its own with an item for each document or sample."""
    prefix = write_corpus(tmp_path / "c" / "corpus", unique_documents(400, 7))

    first, second = (open_reader(reader_type, prefix, tmp_path) for _ in range(2))
    for reader in (first, second):
        reader.open_index(0)
    assert first.num_tokens == second.num_tokens
    np.testing.assert_array_equal(first.validation_documents, second.validation_documents)
    for reader in (first, second):
        own = [array for array in arrays_in(vars(reader)) if array.size > 8 and not is_mapped(array)]
        assert not own


def arrays_in(value: object) -> Iterator[np.ndarray]:
    """Every array in attributes, mappings and tuples."""
    if isinstance(value, np.ndarray):
        yield value
    elif isinstance(value, dict | tuple | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from arrays_in(item)
    elif hasattr(value, "__dict__"):
        yield from arrays_in(vars(value))


def is_mapped(array: object) -> bool:
    """Whether an array is a view of a file."""
    while array is not None:
        if isinstance(array, np.memmap):
            return True
        array = getattr(array, "base", None)
    return False


def test_split_is_the_one_of_before_its_index(tmp_path: Path) -> None:
    """The documents of each split, and their tokens, are fixed by the corpus and the fraction alone."""
    documents = unique_documents(50, 7)
    prefix = write_corpus(tmp_path / "c" / "corpus", documents, 3)
    chosen = np.sort(np.random.RandomState(SPLIT_SEED).permutation(50)[:10])
    for split in SPLITS:
        reader = open_reader(CorpusReader, prefix, tmp_path, split, 0.2)
        np.testing.assert_array_equal(reader.validation_documents, chosen)
        numbers = chosen if split == "validation" else np.setdiff1d(np.arange(50), chosen)
        assert reader.num_tokens == sum(reader.document(number).size for number in numbers)
