"""Samples: their order is a function of (seed, number) alone; splits, mixtures, epochs, wrong corpora."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat.errors import ConfigError
from tests.support.corpora import LENGTH, samples_of, two_corpora, unique_documents, write_corpus
from train.data import blend as blend_module
from train.data.blend import Blend, Mixture
from train.data.stages import TrainingStage, segments

EOD = 7


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return two_corpora(tmp_path_factory.mktemp("corpora"))


def test_sample_is_one_more_token_than_the_sequence(prefixes: list[str], tmp_path: Path) -> None:
    sample = samples_of(prefixes[:1], tmp_path)[0]
    assert sample.shape == (LENGTH + 1,) and sample.dtype == np.int64


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(60)))
def test_random_access_equals_sequential_access(
    order: list[int], prefixes: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Indices over three epochs, in any order, by a new reader without a cache."""
    everything = samples_of(prefixes, tmp_path_factory.mktemp("one"))
    stride = 3 * everything.num_samples // 60
    expected = [everything[number * stride] for number in range(60)]
    other = samples_of(prefixes, tmp_path_factory.mktemp("two"))
    for number in order:
        np.testing.assert_array_equal(other[number * stride], expected[number])


@pytest.mark.parametrize("corpus", [0, 1], ids=["one_sequence", "three_sequences"])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_each_epoch_visits_each_window_once(corpus: int, split: str, prefixes: list[str], tmp_path: Path) -> None:
    samples = samples_of([prefixes[corpus]], tmp_path, split)
    count = samples.num_samples
    assert count == (samples.num_tokens - 1) // LENGTH
    epochs = []
    for epoch in range(3):
        inputs = np.concatenate([samples[epoch * count + place][:-1] for place in range(count)])
        assert np.unique(inputs).size == inputs.size == count * LENGTH  # only a tail shorter than a window is left
        epochs.append(inputs)
    assert not np.array_equal(epochs[0], epochs[1]) and not np.array_equal(epochs[1], epochs[2])


def test_labels_continue_the_inputs(prefixes: list[str], tmp_path: Path) -> None:
    """Ids count up through the corpus, so inside a document each token is the one before plus one."""
    samples = samples_of(prefixes[:1], tmp_path)
    steps = np.concatenate([np.diff(samples[number]) for number in range(samples.num_samples)])
    assert (steps == 1).mean() > 0.9


def test_seed_changes_the_order_of_training_alone(prefixes: list[str], tmp_path: Path) -> None:
    train = [samples_of(prefixes, tmp_path, seed=seed) for seed in (1, 2)]
    assert any(not np.array_equal(train[0][number], train[1][number]) for number in range(5))
    validation = [samples_of(prefixes, tmp_path, "validation", seed=seed) for seed in (1, 2)]
    for number in range(validation[0].num_samples):
        np.testing.assert_array_equal(validation[0][number], validation[1][number])


def test_splits_share_no_document_and_leave_none_out(prefixes: list[str], tmp_path: Path) -> None:
    sets = {}
    for split in ("train", "validation"):
        samples = samples_of(prefixes[:1], tmp_path, split)
        sets[split] = set(np.concatenate([samples[n] for n in range(3 * samples.num_samples)]).tolist())
    assert not sets["train"] & sets["validation"]
    documents = unique_documents(200, 0)
    held_out = samples_of(prefixes[:1], tmp_path).validation_documents(10**6)
    assert len(held_out) == 20
    ids = {tuple(document.tolist()) for document in held_out}
    assert ids <= {tuple(document.tolist()) for document in documents}
    assert sets["validation"] <= {token for document in ids for token in document}
    total = sum(samples_of(prefixes[:1], tmp_path, split).num_tokens for split in ("train", "validation"))
    assert total == sum(len(document) for document in documents)


def test_split_does_not_depend_on_the_sequence_length(prefixes: list[str], tmp_path: Path) -> None:
    documents = [samples_of(prefixes, tmp_path, sequence_length=length).validation_documents(5) for length in (16, 32)]
    for one, other in zip(*documents, strict=True):
        np.testing.assert_array_equal(one, other)


def test_validation_uses_complete_documents_of_all_corpora(prefixes: list[str], tmp_path: Path) -> None:
    train = samples_of(prefixes, tmp_path)
    documents = train.validation_documents(6)
    assert [int(document[0]) >= 500_000 for document in documents] == [False, True] * 3
    everything = {tuple(document.tolist()) for document in unique_documents(90, 500_000, 1)}
    assert tuple(documents[1].tolist()) in everything and documents[1].dtype == np.int64
    assert train.validation_documents(0) == []


def test_mixture_keeps_its_shares_at_every_count(prefixes: list[str], tmp_path: Path) -> None:
    samples = samples_of(prefixes, tmp_path, weights=[3.0, 1.0])
    second = np.cumsum([int(samples[number][0]) >= 500_000 for number in range(400)])
    assert np.abs(second - 0.25 * np.arange(1, 401)).max() <= 1
    assert [samples._mixture.locate(number)[0] for number in range(400)] == np.diff(second, prepend=0).tolist()


def test_default_weights_are_in_proportion_to_tokens(prefixes: list[str], tmp_path: Path) -> None:
    samples = samples_of(prefixes, tmp_path)
    share = samples_of(prefixes[1:], tmp_path).num_tokens / samples.num_tokens
    assert np.mean([samples._mixture.locate(number)[0] for number in range(1000)]) == pytest.approx(share, abs=1e-3)


WEIGHTS = st.lists(st.floats(0.01, 1.0), min_size=2, max_size=5)


@settings(max_examples=25, deadline=None)
@given(weights=WEIGHTS, counts=st.lists(st.integers(1, 300), min_size=1, max_size=3))
def test_blend_deals_each_corpus_in_order(weights: list[float], counts: list[int]) -> None:
    """Numbers of each corpus are 0, 1, 2, … over borders of blocks, and `drawn` counts them."""
    before = blend_module.BLOCK
    blend_module.BLOCK = 128
    try:
        blend = Blend(weights)
        places = [blend.locate(index) for index in range(max(counts))]
        for corpus in range(len(weights)):
            numbers = [number for which, number in places if which == corpus]
            assert numbers == list(range(len(numbers)))
        for count in counts:
            dealt = np.bincount([which for which, _ in places[:count]], minlength=len(weights))
            np.testing.assert_array_equal(blend.drawn(count), dealt)
            shares = np.array(weights) / sum(weights)
            assert np.abs(dealt - shares * count).max() < 1 + len(weights) / 2 + count / 128
    finally:
        blend_module.BLOCK = before


def test_stages_change_the_weights_and_repeat_no_sample() -> None:
    stages = [TrainingStage(100 * LENGTH, [0.2, 0.8]), TrainingStage(200 * LENGTH - 3, [1.0, 0.0])]
    mixture = Mixture([0.9, 0.1], segments(stages, LENGTH, 8))
    places = [mixture.locate(index)[:2] for index in range(300)]
    shares = [np.mean([corpus for corpus, _ in places[start : start + 100]]) for start in (0, 100, 200)]
    assert shares == pytest.approx([0.1, 0.8, 0.0], abs=0.011)
    for wanted in (0, 1):
        numbers = [number for corpus, number in places if corpus == wanted]
        assert numbers == list(range(len(numbers)))


def test_tiny_and_zero_weights_stay_within_one_sample() -> None:
    assert Blend([1.0, 1e-9]).drawn(1 << 20)[1] <= 1
    assert Blend([1.0, 0.0]).drawn(1 << 20)[1] == 0


def test_another_rank_needs_no_barrier(prefixes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """megatron lets only rank 0 build its cache; here rank 1 alone gets the same samples."""
    import torch

    expected = [samples_of(prefixes, tmp_path / "a")[number] for number in range(20)]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda *_: 1)
    samples = samples_of(prefixes, tmp_path / "b")
    for number in range(20):
        np.testing.assert_array_equal(samples[number], expected[number])


def test_lost_race_and_torn_cache_change_nothing(
    prefixes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from train.data import epochs

    def absent(folder: Path, _: Any) -> None:
        raise FileNotFoundError(folder)

    first = samples_of(prefixes[:1], tmp_path)[0]
    (folder,), (split,) = tmp_path.glob("epoch-*"), tmp_path.glob("split-*")
    names = ["documents.npy", "index.json", "samples.npy", "shuffle.npy"]
    assert sorted(path.name for path in folder.iterdir()) == names
    with monkeypatch.context() as patch:  # the other rank was first, after our check
        patch.setattr(epochs, "read_index", absent)
        np.testing.assert_array_equal(samples_of(prefixes[:1], tmp_path)[0], first)
    (folder / "samples.npy").write_bytes((folder / "samples.npy").read_bytes()[:40])
    np.testing.assert_array_equal(samples_of(prefixes[:1], tmp_path)[0], first)
    assert set(tmp_path.iterdir()) == {folder, split}


def test_rebuilt_corpus_does_not_use_the_old_cache(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "c" / "corpus", unique_documents(50, 0))
    samples_of([prefix], tmp_path / "cache")[0]
    write_corpus(tmp_path / "c" / "corpus", unique_documents(30, 10_000, 5))
    samples = samples_of([prefix], tmp_path / "cache")
    ids = np.concatenate([samples[number][:-1] for number in range(samples.num_samples)])
    assert ids.min() >= 10_000 and np.unique(ids).size == ids.size


def with_empty_documents(prefix: Path, where: str) -> str:
    """A corpus of 40 documents where every second one has no sequence, or a sequence without tokens."""
    documents = unique_documents(20, 0)
    lengths, bounds = [], [0]
    for document in documents:
        lengths += [len(document)] if where == "no_sequence" else [0, len(document)]
        bounds += [bounds[-1], len(lengths)] if where == "no_sequence" else [len(lengths) - 1, len(lengths)]
    sizes = np.array(lengths, dtype="<i4")
    pointers = (np.cumsum(sizes, dtype=np.int64) - sizes) * 4
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.bin").write_bytes(np.concatenate(documents).astype("<i4").tobytes())
    head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, len(sizes), len(bounds))
    body = sizes.tobytes() + pointers.tobytes() + np.array(bounds, dtype="<i8").tobytes()
    Path(f"{prefix}.idx").write_bytes(head + body)
    return str(prefix)


@pytest.mark.parametrize("where", ["no_sequence", "no_tokens"])
def test_documents_without_tokens_are_passed_over(where: str, tmp_path: Path) -> None:
    """As Megatron's tools write them for empty lines; the text that is there is read whole."""
    prefix = with_empty_documents(tmp_path / "c" / "corpus", where)
    read = []
    for split in ("train", "validation"):
        samples = samples_of([prefix], tmp_path / "cache", split, validation_fraction=0.3, sequence_length=2)
        read += [samples[number][:-1] for number in range(samples.num_samples)]
        shown = samples.validation_documents(100)
        assert shown and all(document.size for document in shown)
    total = sum(len(document) for document in unique_documents(20, 0))
    ids = np.concatenate(read)
    assert np.unique(ids).size == ids.size and ids.size >= total - 6


def info_of(**changes: Any) -> str:
    values: dict[str, Any] = {
        "documents": 9,
        "tokens": 9,
        "bytes": 9,
        "vocab_size": 9,
        "max_token_id": 9,
        "eod": EOD,
    }
    values |= {"source": "s", "tokenizer_sha256": "x", "settings": {}, "versions": {}, "seconds": 0.0}
    return json.dumps(values | changes)


def _damage(suffix: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(prefix: Path) -> None:
        path = Path(f"{prefix}{suffix}")
        path.write_bytes(change(path.read_bytes()))

    return apply


def _rewrite(documents: Callable[[], list[np.ndarray]]) -> Callable[[Path], None]:
    def apply(prefix: Path) -> None:
        write_corpus(prefix, documents())

    return apply


def _remove(*suffixes: str) -> Callable[[Path], None]:
    def apply(prefix: Path) -> None:
        for suffix in suffixes:
            Path(f"{prefix}{suffix}").unlink()

    return apply


def _info(text: str) -> Callable[[Path], None]:
    def apply(prefix: Path) -> None:
        Path(f"{prefix}.json").write_text(text)

    return apply


def _nothing(prefix: Path) -> None:
    """Leave the corpus valid; the settings are wrong."""


@pytest.mark.parametrize(
    ("damage", "changes", "words"),
    [
        (_remove(".bin"), {}, r"has no corpus\.bin; build it with `longcat data build`"),
        (_remove(".idx"), {}, r"has no corpus\.idx"),
        (_remove(".bin", ".idx"), {}, r"no corpus\.idx and no corpus\.bin"),
        (_damage(".bin", lambda data: data[:-6]), {}, "bytes where its index asks for"),
        (_damage(".bin", lambda data: data + b"0000"), {}, "bytes where its index asks for"),
        (_damage(".bin", lambda data: b""), {}, "has 0 bytes where"),
        (_damage(".idx", lambda data: data[:-8]), {}, "truncated"),
        (_damage(".idx", lambda data: data[:20]), {}, "less than its header"),
        (_damage(".idx", lambda data: b""), {}, "less than its header"),
        (_damage(".idx", lambda data: b"text, and some more of it " * 3), {}, "not a Megatron index"),
        (_damage(".idx", lambda data: data[:17] + b"\x06" + data[18:]), {}, "not a Megatron index"),
        (_damage(".idx", lambda data: data[:300] + b"\x01" + data[301:]), {}, "do not follow each other"),
        (_damage(".idx", lambda data: data[:-8] + b"\xff" * 8), {}, "documents do not follow each other"),
        (_rewrite(list), {}, "is empty"),
        (_rewrite(lambda: [np.arange(40)]), {}, "a validation split needs at least 2"),
        (_rewrite(lambda: unique_documents(3, 0)), {"sequence_length": 500}, "train split .* needs 501"),
        (_nothing, {"split": "validation", "sequence_length": 500}, "raise data.validation_fraction"),
        (_nothing, {"sequence_length": 1}, r"train\.sequence_length=1"),
        (_info("{"), {}, "is damaged"),
        (_info("[]"), {}, "is damaged"),
        (_info("{}"), {}, "is damaged"),
        (_info(info_of(max_token_id=300)), {"vocab_size": 300}, "token id 300"),
        (_nothing, {"weights": [1.0, 2.0]}, "2 entries for 1"),
    ],
)  # fmt: skip
def test_wrong_corpus_is_refused_in_one_line(
    damage: Callable[[Path], object], changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    prefix = write_corpus(tmp_path / "c" / "corpus", unique_documents(60, 0))
    damage(Path(prefix))
    with pytest.raises(ConfigError, match=words) as caught:
        samples_of([prefix], tmp_path / "cache", **changes)
    assert "\n" not in str(caught.value)


def test_id_outside_the_vocabulary_is_found_when_it_is_read(prefixes: list[str], tmp_path: Path) -> None:
    samples = samples_of(prefixes[:1], tmp_path, vocab_size=200)
    with pytest.raises(ConfigError, match=r"corpus holds the token id \d+ but model\.vocab_size=200"):
        for number in range(samples.num_samples):
            samples[number]
    with pytest.raises(ConfigError, match=r"model\.vocab_size=200"):
        samples.validation_documents(100)
    negative = write_corpus(tmp_path / "n" / "corpus", [np.full(50, -1), np.full(50, -1)])
    with pytest.raises(ConfigError, match="token id -1"):
        samples_of([negative], tmp_path)[0]


def test_corpora_of_two_tokenizers_are_refused(tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        paths.append(write_corpus(tmp_path / name / "corpus", unique_documents(60, 0)))
        Path(f"{paths[-1]}.json").write_text(info_of(tokenizer_sha256=name))
    with pytest.raises(ConfigError, match="made with another tokenizer"):
        samples_of(paths, tmp_path / "cache")


def test_negative_numbers_and_unwritable_caches_are_refused(prefixes: list[str], tmp_path: Path) -> None:
    samples = samples_of(prefixes, tmp_path)
    with pytest.raises(IndexError, match="start at 0"):
        samples[-1]
    with pytest.raises(ValueError, match="negative"):
        samples.validation_documents(-1)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ConfigError, match="cannot write the sample index"):
        samples_of(prefixes, tmp_path / "file")[0]
