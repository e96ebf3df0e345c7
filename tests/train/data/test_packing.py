"""Packed samples: documents that fit are never cut, each label occurs once an epoch, what is left is padding."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longcat.documents import PADDING
from longcat.errors import ConfigError
from tests.support.corpora import LENGTH, samples_of, two_corpora, unique_documents, write_corpus
from train.batches import BatchReader
from train.compose import compose
from train.data import packed
from train.data.config import DataConfig, Packing
from train.data.packing import best_fit, pack
from train.data.samples import TokenSamples
from train.data.stages import TrainingStage

PACKED: dict[str, Any] = {"packing": Packing.best_fit, "mask_documents": True}


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return two_corpora(tmp_path_factory.mktemp("corpora"))


@given(sizes=st.lists(st.integers(2, 30), max_size=80), capacity=st.integers(30, 40))
def test_bins_are_those_of_best_fit_one_by_one(sizes: list[int], capacity: int) -> None:
    found, num_bins = best_fit(np.array(sizes, dtype=np.int64), capacity)
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= size]
        number = min(fitting)[1] if fitting else len(rooms)
        if number == len(rooms):
            rooms.append(capacity)
        rooms[number] -= size
    ours = capacity - np.bincount(found, np.array(sizes, dtype=np.int64), minlength=num_bins)
    assert sorted(ours.tolist()) == sorted(rooms)


def test_documents_of_one_length_take_little_memory() -> None:
    """Many bins with equal room, of which each shorter length takes one: neither joined nor kept again and again."""
    sizes = np.concatenate([np.full(5_000, 6_000), np.arange(2, 2_000)])
    tracemalloc.start()
    found, num_bins = best_fit(sizes, 8_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.bincount(found, sizes).max() <= 8_000 and num_bins == 5_000
    assert peak < 4 << 20, "bytes; the bins themselves are 40 KB"


@given(lengths=st.lists(st.integers(0, 70), max_size=40))
def test_every_token_but_a_documents_first_is_a_label_once(lengths: list[int]) -> None:
    """A document that fits is one piece; of a longer one, all but the last piece fill a sample."""
    sizes = np.array(lengths, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    pieces, bounds = pack(starts, sizes, LENGTH)
    assert bounds[0] == 0 and bounds[-1] == len(pieces)
    each = np.split(pieces[:, 1], bounds[1:-1])
    assert all(2 <= part.sum() <= LENGTH + 1 for part in each if len(pieces))
    labels = [token for start, size in pieces.tolist() for token in range(start + 1, start + size)]
    wanted = [token for start, size in zip(starts, sizes, strict=True) for token in range(start + 1, start + size)]
    assert sorted(labels) == wanted
    whole = {(int(start), int(size)) for start, size in zip(starts, sizes, strict=True) if 2 <= size <= LENGTH + 1}
    assert whole <= set(map(tuple, pieces.tolist()))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_an_epoch_has_each_label_of_the_split_once(prefixes: list[str], tmp_path: Path, split: str) -> None:
    """Two epochs of a corpus with three sequences in a document, which is packed as one; ids tell the token."""
    samples = samples_of(prefixes[1:], tmp_path, split, **PACKED)
    epochs = [range(samples.num_samples), range(samples.num_samples, 2 * samples.num_samples)]
    labels, orders = [], []
    for epoch in epochs:
        texts = [text for number in epoch for text in samples.texts(number)]
        labels.append(sorted(int(one) for text in texts for one in text[1:]))
        orders.append([tuple(text.tolist()) for text in texts])
    assert all(np.all(np.diff(text) == 1) for text in orders[0]), "no text crosses documents"
    documents = unique_documents(90, 500_000, 1)
    held_out = set(samples._readers[0].validation_documents.tolist())
    chosen = [one for number, one in enumerate(documents) if (number in held_out) == (split == "validation")]
    assert labels[0] == labels[1] == sorted(int(one) for document in chosen for one in document[1:])
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_the_packing_is_read_from_the_index(
    prefixes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process reads the same samples and packs nothing; another seed is another order of the same packing."""
    first = samples_of(prefixes, tmp_path, **PACKED)
    expected = [first.with_documents(number) for number in range(60)]
    monkeypatch.setattr(packed, "pack", lambda *_: pytest.fail("packed again"))
    again = samples_of(prefixes, tmp_path, **PACKED)
    for number in (59, *range(60)):
        np.testing.assert_array_equal(again.with_documents(number), expected[number])
    other = samples_of(prefixes, tmp_path, **PACKED, seed=4)
    assert any(not np.array_equal(other.with_documents(number), expected[number]) for number in range(60))


def test_batches_leave_out_padding_and_ends(tmp_path: Path) -> None:
    """What counts, and the counts that are made before the copy, by a loop over positions."""
    words = ["model=debug", "model.num_mtp_layers=2", f"train.sequence_length={LENGTH}", "train.global_batch_size=4"]
    words += ["train.micro_batch_size=4", "data.mask_documents=true", "data.packing=best_fit"]
    prefix = write_corpus(tmp_path / "corpus", [np.arange(1, 4 + number % 9) for number in range(200)])
    samples = samples_of([prefix], tmp_path, **PACKED)
    topology: Any = SimpleNamespace(device=torch.device("cpu"), data_rank=0, data_ranks=1, sizes=None)
    reader, padded = BatchReader(samples, compose(words), topology), 0
    for first in range(0, 40, 4):
        (batch,) = reader.read(first)
        main = further = 0
        for row in range(4):
            ids, numbers = samples.with_documents(first + row)
            counts = [numbers[at] == numbers[at + 1] != PADDING for at in range(LENGTH)]
            assert batch.valid[row].tolist() == counts
            assert torch.equal(batch.labels[row], torch.from_numpy(ids[1:]))
            main += sum(counts)
            for depth in (1, 2):
                ahead = [at + depth + 1 for at in range(LENGTH - depth)]
                further += sum(bool(numbers[at - depth - 1] == numbers[at] != PADDING) for at in ahead)
            assert batch.documents is not None and batch.documents.padding is not None
            assert batch.documents.padding.mask[row].tolist() == (numbers[:-1] == PADDING).tolist()
            padded += int((numbers[:-1] == PADDING).sum())
        assert batch.num_labels == (main, further)
    assert padded


def test_the_index_knows_the_share_of_padding(prefixes: list[str], tmp_path: Path) -> None:
    """As counted in an epoch of each corpus; in a mixture by the shares, in a stage in its samples; nothing written."""

    def counted(**changes: Any) -> float:
        samples = samples_of(prefixes, tmp_path / "index", **PACKED, **changes)
        length = changes.get("sequence_length", LENGTH)
        return float(np.mean([samples.with_documents(n)[1, :length] == PADDING for n in range(samples.num_samples)]))

    found = samples_of(prefixes, tmp_path / "not here", **PACKED, writes=False)
    assert found.padding() == (found.num_samples, pytest.approx(counted()))
    alone = [samples_of([prefix], tmp_path / "index", **PACKED).padding()[1] for prefix in prefixes]
    assert alone[0] != alone[1]
    stages = [TrainingStage(4 * LENGTH, weights=[1.0, 0.0]), TrainingStage(8 * LENGTH, sequence_length=2 * LENGTH)]
    mixed = samples_of(prefixes, tmp_path / "not here", **PACKED, writes=False, weights=[0.2, 0.8], stages=stages)
    assert mixed.padding()[1] == pytest.approx(0.2 * alone[0] + 0.8 * alone[1])
    assert mixed.padding(1)[1] == pytest.approx(alone[0])
    longer = samples_of(prefixes[:1], tmp_path / "index", **PACKED, sequence_length=2 * LENGTH)
    assert mixed.padding(2)[1] == pytest.approx(longer.padding()[1])
    assert not (tmp_path / "not here").exists()


def test_packing_without_document_masks_is_refused() -> None:
    with pytest.raises(ConfigError, match="mask_documents=true"):
        DataConfig("n", "s", packing=Packing.best_fit).validate()


def test_a_split_without_a_label_is_refused(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "corpus", [np.array([5])] * 40)
    with pytest.raises(ConfigError, match="nothing to predict"):
        samples_of([prefix], tmp_path / "cache", **PACKED)


def test_samples_are_longer_in_a_stage_of_longer_sequences(prefixes: list[str], tmp_path: Path) -> None:
    """Each length has a packing of its own."""
    samples: TokenSamples = samples_of(prefixes, tmp_path, **PACKED)
    longer = samples_of(prefixes, tmp_path, **PACKED, sequence_length=4 * LENGTH)
    assert longer.num_samples < samples.num_samples
    assert longer[0].shape == (4 * LENGTH + 1,)
    padding = [np.mean([one.with_documents(n)[1] == PADDING for n in range(40)]) for one in (samples, longer)]
    assert padding[1] < 0.2, padding
