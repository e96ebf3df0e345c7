"""Stages: where they begin, moving mixtures, positions of corpora when the length of a sample changes."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from longcat.errors import ConfigError
from tests.support.corpora import unique_documents, write_corpus
from train.data.blend import GOLDEN, RUN, Blend, Mixture, Ramp
from train.data.config import DataConfig
from train.data.samples import TokenSamples
from train.data.stages import TrainingStage, check_segments, segment_of, segments

STAGES = [
    TrainingStage(100, [1.0, 3.0]),
    TrainingStage(1000, sequence_length=64),
    TrainingStage(2000, [3.0, 1.0], ramp_tokens=6400),
    TrainingStage(10_000, rope_theta=5e6, sequence_length=128),
]


def test_stages_begin_with_samples_or_with_steps() -> None:
    """16 × 16 = 256 tokens a step; a mixture alone begins with the first sample at its tokens or later."""
    found = segments(STAGES, 16, 16)
    assert [(one.start, one.tokens, one.length, one.batch) for one in found] == [
        (0, 0, 16, 16),
        (7, 112, 16, 16),
        (64, 1024, 64, 4),
        (64 + 16, 2048, 64, 4),
        (64 + 36 * 4, 10240, 128, 2),
    ]
    assert [segment_of(found, sample).number for sample in (0, 6, 7, 63, 64, 80, 207, 208)] == [0, 0, 1, 1, 2, 3, 3, 4]
    assert segment_of(found, 210).tokens_at(210) == 10240 + 2 * 128
    check_segments(found)


def test_mixtures_alone_keep_their_order_of_before() -> None:
    """The rule of the versions that knew nothing but weights, written out."""
    weights, stages = [2.0, 1.0], [TrainingStage(333, [1.0, 3.0]), TrainingStage(1000, [0.0, 1.0])]
    mixture = Mixture(weights, segments(stages, 16, 8))
    starts, tables = [0, 21, 63], [weights, [1.0, 3.0], [0.0, 1.0]]
    given = np.zeros(2, dtype=np.int64)
    for start, stop, table in zip(starts, [*starts[1:], 150], tables, strict=True):
        blend = Blend(table)
        for index in range(start, stop):
            corpus, number = blend.locate(index - start)
            assert mixture.locate(index) == (corpus, number + given[corpus], 16)
        given += blend.drawn(stop - start)


def test_ramp_moves_the_shares_linearly() -> None:
    """Every stretch of 400 samples is within 4 of the mean of its shares, and no sample comes twice."""
    old, new, samples = [8.0, 1.0, 1.0], [1.0, 0.0, 3.0], 3 * RUN + 100
    ramp = Ramp(old, new, samples)
    places = [ramp.locate(index) for index in range(samples)]
    corpora = np.array([corpus for corpus, _ in places])
    middles = ((np.arange(samples) + 0.5) / samples)[:, None]
    shares = np.array([0.8, 0.1, 0.1]) * (1 - middles) + np.array([0.25, 0.0, 0.75]) * middles
    for start in range(0, samples - 400, 100):
        counts = np.bincount(corpora[start : start + 400], minlength=3)
        assert np.abs(counts - shares[start : start + 400].sum(0)).max() < 4
    for corpus in range(3):
        numbers = [number for chosen, number in places if chosen == corpus]
        assert numbers == list(range(len(numbers)))
        assert ramp.drawn(samples)[corpus] == len(numbers)


def test_a_ramp_takes_the_memory_of_what_it_keeps() -> None:
    """Two bytes a sample, and at most one more at its peak; the corpora are those of one formula over all samples."""
    samples, old, new = 64 * RUN + 77, [3.0, 1.0, 1.0], [1.0, 0.0, 3.0]
    tracemalloc.start()
    ramp = Ramp(old, new, samples)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * samples
    numbers = np.arange(samples, dtype=np.float64) + 0.5
    expected = np.zeros(samples, dtype=np.int16)
    for low, high in ((0.6, 0.25), (0.8, 0.25)):
        expected += numbers * GOLDEN % 1.0 >= low + (high - low) * (numbers / samples)
    assert np.mean(expected == ramp._corpus) > 0.9999


def test_corpora_continue_at_their_tokens_in_another_length() -> None:
    mixture = Mixture([1.0, 1.0], segments(STAGES, 16, 16))
    places = [mixture.locate(index) for index in range(300)]
    assert [length for _, _, length in places] == [16] * 64 + [64] * 144 + [128] * 92
    for start, length in ((64, 64), (208, 128)):
        for corpus in (0, 1):
            given = sum(size for chosen, _, size in places[:start] if chosen == corpus)
            numbers = [number for chosen, number, _ in places[start:] if chosen == corpus]
            bound = -(-given // length)
            assert numbers[0] in (bound, bound + 1), "rounded up where the length changes, at most once before"


def test_windows_have_the_length_of_their_stage(tmp_path: Path) -> None:
    """They follow from the number alone: the same ones after other reads; validation reads each length."""
    prefix = write_corpus(tmp_path / "a" / "corpus", unique_documents(400, 0))
    config = DataConfig("n", "s", paths=[prefix], stages=[TrainingStage(500, sequence_length=64)])

    def open_samples(split: Literal["train", "validation"]) -> TokenSamples:
        return TokenSamples(
            config, sequence_length=16, seed=3, vocab_size=1 << 20, split=split, cache_dir=tmp_path, global_batch_size=8
        )

    samples = open_samples("train")
    windows = {number: samples[number] for number in (33, 31, 40, 0, 32)}
    assert {number: len(window) for number, window in windows.items()} == {0: 17, 31: 17, 32: 65, 33: 65, 40: 65}
    for window in windows.values():
        assert len(set(window)) == len(window), "ids of this corpus do not repeat"
    again = open_samples("train")
    assert all(np.array_equal(again[number], window) for number, window in windows.items())
    held_out = open_samples("validation")
    longer = held_out.of_length(64)
    assert (len(held_out[0]), len(longer[0])) == (17, 65)
    assert longer.num_samples == (held_out.num_tokens - 1) // 64 < held_out.num_samples


def test_a_short_corpus_is_refused_only_where_it_is_read(tmp_path: Path) -> None:
    """The second corpus is shorter than a sample of the stage, in which validation leaves it out."""
    long = write_corpus(tmp_path / "long" / "corpus", unique_documents(200, 0))
    short = write_corpus(tmp_path / "short" / "corpus", [np.arange(30) + 500_000] * 4)

    def open_samples(split: Literal["train", "validation"], first: list[float], *weights: float) -> TokenSamples:
        stage = TrainingStage(512, list(weights), sequence_length=128)
        config = DataConfig("n", "s", paths=[long, short], weights=first, stages=[stage], validation_fraction=0.25)
        return TokenSamples(
            config, sequence_length=16, seed=3, vocab_size=1 << 20, split=split, cache_dir=tmp_path, global_batch_size=8
        )

    samples = open_samples("train", [1.0, 1.0], 1.0, 0.0)
    assert {len(samples[number]) for number in range(32, 40)} == {129}
    assert any(samples[number][0] >= 500_000 for number in range(8)), "it is read before"
    held_out = open_samples("validation", [1.0, 1.0], 1.0, 0.0)
    assert any(held_out[number][0] >= 500_000 for number in range(8))
    longer = held_out.of_length(128)
    assert all(longer[number][0] < 500_000 for number in range(8))
    assert [longer.of_corpus(number, 128).num_samples > 0 for number in (0, 1)] == [True, False]
    for split in ("train", "validation"):
        with pytest.raises(ConfigError, match=r"one sample needs 129: .*data.stages\[0\].sequence_length=128"):
            open_samples(split, [1.0, 1.0], 1.0, 0.1)
        with pytest.raises(ConfigError, match="one sample needs 129"):
            open_samples(split, [0.0, 1.0], 0.0, 1.0)


def test_a_corpus_without_a_share_is_never_read(tmp_path: Path) -> None:
    """Also the first one, to which Megatron's blending gives the ties; it may have no sample at all."""
    for shares in ([0.0, 1.0], [0.0, 3.0, 7.0], [0.0, 1.0, 1.0, 1.0], [1.0, 0.0, 1.0]):
        drawn = Blend(shares).drawn(1 << 20)
        assert [count > 0 for count in drawn] == [share > 0 for share in shares]
    short = write_corpus(tmp_path / "short" / "corpus", [np.arange(30) + 500_000] * 4)
    long = write_corpus(tmp_path / "long" / "corpus", unique_documents(200, 0))
    config = DataConfig("n", "s", paths=[short, long], weights=[0.0, 1.0], validation_fraction=0.25)
    samples = TokenSamples(config, sequence_length=128, seed=3, vocab_size=1 << 20, split="train", cache_dir=tmp_path)
    assert all(samples[number][0] < 500_000 for number in range(8))


def test_a_refusal_names_the_key_that_set_the_length(tmp_path: Path) -> None:
    long = write_corpus(tmp_path / "long" / "corpus", unique_documents(200, 0))
    short = write_corpus(tmp_path / "short" / "corpus", [np.arange(30) + 500_000] * 4)
    cases = [
        (
            [TrainingStage(512, [1, 0], sequence_length=128), TrainingStage(2048, [0, 1])],
            r"stages\[0\].sequence_length=128",
        ),
        ([TrainingStage(512, [0, 1])], "train.sequence_length=128"),
    ]
    for stages, key in cases:
        first = 16 if stages[0].sequence_length else 128
        config = DataConfig("n", "s", paths=[long, short], weights=[1, 0], stages=stages, validation_fraction=0.25)
        with pytest.raises(ConfigError, match=f"lower .*{key}"):
            TokenSamples(
                config,
                sequence_length=first,
                seed=3,
                vocab_size=1 << 20,
                split="train",
                cache_dir=tmp_path,
                global_batch_size=128 // first,
            )


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ([TrainingStage(300, sequence_length=48)], "sequence_length=48 does not divide the 256 tokens of a step"),
        ([TrainingStage(300, sequence_length=512)], "sequence_length=512 does not divide the 256 tokens of a step"),
        ([TrainingStage(300, rope_theta=2.0), TrainingStage(500, rope_theta=3.0)], "begins with the same step"),
        ([TrainingStage(100, [1.0], 500), TrainingStage(500, [2.0])], r"stages\[0\].ramp_tokens=500 goes on when"),
        ([TrainingStage(100, [1.0], 1 << 40)], r"stages\[0\].ramp_tokens in samples=68719476736 must be at most"),
    ],
)
def test_stages_that_do_not_fit_are_refused(stages: list[TrainingStage], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        check_segments(segments(stages, 16, 16))
    assert "\n" not in str(caught.value)
