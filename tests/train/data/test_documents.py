"""Documents of a sample are those of the corpus's index, whatever ids they end with."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.corpora import samples_of, two_corpora, unique_documents, write_corpus
from tests.support.running import numbers_by_end
from train.batches import BatchReader
from train.compose import compose

EOD = 7


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return two_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_documents_are_those_of_the_end_token(tmp_path: Path, split: str) -> None:
    """Where documents end with one id that occurs nowhere else, as `longcat data build` writes them."""
    prefix = write_corpus(tmp_path / "corpus", [np.append(one, EOD) for one in unique_documents(200, 100)])
    samples = samples_of([prefix], tmp_path / "cache", split)
    for number in range(2 * samples.num_samples):
        ids, documents = samples.with_documents(number)
        np.testing.assert_array_equal(ids, samples[number])
        np.testing.assert_array_equal(documents, numbers_by_end(ids, EOD))


def test_documents_without_an_end_token_are_those_of_the_index(prefixes: list[str], tmp_path: Path) -> None:
    """Ids tell the document: no two have one in common, and the last id of each is different."""
    documents = unique_documents(200, 0)
    of_id = {int(one): number for number, document in enumerate(documents) for one in document}
    samples = samples_of(prefixes[:1], tmp_path)
    for number in range(samples.num_samples):
        ids, numbers = samples.with_documents(number)
        expected = np.array([of_id[int(one)] for one in ids])
        changes = np.diff(expected, prepend=expected[0]) != 0
        np.testing.assert_array_equal(numbers, changes.cumsum())


def test_an_end_token_inside_a_document_does_not_divide_it(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "corpus", [np.array([5, EOD, 5, EOD, 5]), np.array([EOD] * 3)] * 40)
    samples = samples_of([prefix], tmp_path / "cache")
    ids, numbers = (np.concatenate(parts) for parts in zip(*(samples.with_documents(n) for n in range(8)), strict=True))
    pairs = (ids[:-1] == EOD) & (ids[1:] == 5)
    assert pairs.any() and (np.diff(numbers)[pairs] == 0).any()


def test_pieces_are_one_document_only_in_their_order(prefixes: list[str], tmp_path: Path) -> None:
    """Megatron shuffles sequences: of three in a document, the next in a sample may be of another one."""
    documents = unique_documents(90, 500_000, 1)
    pieces = [(number, piece) for number, one in enumerate(documents) for piece in np.array_split(one, 3)]
    place = {int(one): (number, at) for at, (number, piece) in enumerate(pieces) for one in piece}
    samples, joined, parted = samples_of(prefixes[1:], tmp_path), 0, 0
    for sample in range(2 * samples.num_samples):
        ids, numbers = samples.with_documents(sample)
        for (left, right), change in zip(pairwise(place[int(one)] for one in ids), np.diff(numbers), strict=True):
            goes_on = left[0] == right[0] and right[1] - left[1] in (0, 1)
            assert change == (0 if goes_on else 1)
            joined += goes_on and left != right
            parted += not goes_on
    assert joined and parted


def test_attention_masks_follow_the_index(tmp_path: Path) -> None:
    """Without any end token, through the reader of batches."""
    words = ["model=debug", "train.sequence_length=16", "data.mask_documents=true", "train.global_batch_size=2"]
    config = compose([*words, "train.micro_batch_size=2"])
    prefix = write_corpus(tmp_path / "corpus", unique_documents(60, 1))
    samples = samples_of([prefix], tmp_path / "cache", mask_documents=True)
    topology: Any = SimpleNamespace(device=torch.device("cpu"), data_rank=0, data_ranks=1, sizes=None)
    reader, several = BatchReader(samples, config, topology), 0
    for first in range(0, 20, 2):
        (batch,) = reader.read(first)
        expected = np.stack([samples.with_documents(first + row)[1, :-1] for row in range(2)])
        assert batch.documents is not None
        np.testing.assert_array_equal(batch.documents.numbers.numpy(), expected)
        several += int(expected.max())
    assert several
