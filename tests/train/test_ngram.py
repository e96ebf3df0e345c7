"""Kneser-Ney n-grams against a dictionary implementation written from the formulas, and their sums."""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat.errors import ConfigError
from train.ngram import NgramModel, kneser_ney

VOCABULARY = 5
SEQUENCES = st.lists(st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=25), min_size=1, max_size=6)


class Slow:
    """The same model with dictionaries, one probability at a time."""

    def __init__(self, sequences: list[list[int]], size: int) -> None:
        self.size = size
        self.words = Counter(word for line in sequences for word in line)
        self.pairs = Counter(pair for line in sequences for pair in pairwise(line))
        self.triples = Counter(t for line in sequences for t in zip(line, line[1:], line[2:], strict=False))
        self.before_word = Counter(word for _, word in self.pairs)
        self.before_pair = Counter((v, w) for _, v, w in self.triples)

    @staticmethod
    def discount(counts: Counter[Any]) -> float:
        kinds = Counter(counts.values())
        return kinds[1] / (kinds[1] + 2 * kinds[2]) if kinds[1] else 0.5

    def base(self, counts: Counter[Any], word: int) -> float:
        total = sum(counts.values())
        if not total:
            return 1 / self.size
        d = self.discount(counts)
        return max(counts[word] - d, 0) / total + d * len(counts) / total / self.size

    def step(self, counts: Counter[Any], context: tuple[int, ...], word: int, lower: float) -> float:
        after: dict[int, int] = defaultdict(int)
        for key, count in counts.items():
            if key[:-1] == context:
                after[key[-1]] += count
        total = sum(after.values())
        if not total:
            return lower
        d = self.discount(counts)
        return max(after.get(word, 0) - d, 0) / total + d * len(after) / total * lower

    def bigram(self, v: int, w: int) -> float:
        return self.step(self.pairs, (v,), w, self.base(self.before_word, w))

    def trigram(self, u: int, v: int, w: int) -> float:
        lower = self.step(self.before_pair, (v,), w, self.base(self.before_word, w))
        return self.step(self.triples, (u, v), w, lower)


def arrays(sequences: list[list[int]]) -> list[np.ndarray]:
    return [np.array(line) for line in sequences]


@settings(max_examples=60, deadline=None)
@given(train=SEQUENCES)
def test_probabilities_equal_the_dictionary_model_and_sum_to_one(train: list[list[int]]) -> None:
    fast, slow = NgramModel(arrays(train), VOCABULARY), Slow(train, VOCABULARY)
    words = np.arange(VOCABULARY)
    unigram = [slow.base(slow.words, w) for w in range(VOCABULARY)]
    np.testing.assert_allclose(fast.unigram(words), unigram, rtol=1e-12)
    assert fast.unigram(words).sum() == pytest.approx(1, abs=1e-12)
    for v in range(VOCABULARY):
        previous = np.full(VOCABULARY, v)
        got = fast.bigram(previous, words)
        np.testing.assert_allclose(got, [slow.bigram(v, w) for w in range(VOCABULARY)], rtol=1e-12)
        assert got.sum() == pytest.approx(1, abs=1e-12)
        for u in range(VOCABULARY):
            got = fast.trigram(np.full(VOCABULARY, u), previous, words)
            np.testing.assert_allclose(got, [slow.trigram(u, v, w) for w in range(VOCABULARY)], rtol=1e-12)
            assert got.sum() == pytest.approx(1, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(train=SEQUENCES, validation=SEQUENCES)
def test_nats_are_means_over_all_tokens_but_the_first(train: list[list[int]], validation: list[list[int]]) -> None:
    slow = Slow(train, VOCABULARY)
    lines = [*validation, [1, 2, 3]]
    unigram, bigram, trigram = [], [], []
    for line in lines:
        for place in range(1, len(line)):
            word, v = line[place], line[place - 1]
            unigram.append(-math.log(slow.base(slow.words, word)))
            bigram.append(-math.log(slow.bigram(v, word)))
            trigram.append(-math.log(slow.trigram(line[place - 2], v, word)) if place > 1 else bigram[-1])
    got = kneser_ney(arrays(train), arrays(lines), VOCABULARY)
    assert got["unigram"] == pytest.approx(np.mean(unigram), rel=1e-12)
    assert got["bigram"] == pytest.approx(np.mean(bigram), rel=1e-12)
    assert got["trigram"] == pytest.approx(np.mean(trigram), rel=1e-12)
    assert got["train_tokens"] == sum(len(line) for line in train)


def test_no_ngram_crosses_a_border() -> None:
    apart = NgramModel(arrays([[0, 1, 0, 1], [2, 3, 2, 3]]), 4)
    joined = NgramModel(arrays([[0, 1, 0, 1, 2, 3, 2, 3]]), 4)
    one, two = np.array([1]), np.array([2])
    assert joined.bigram(one, two)[0] > apart.bigram(one, two)[0]


def test_longer_ngrams_predict_structured_text_better() -> None:
    rng = np.random.default_rng(0)
    following = rng.integers(0, 50, size=(50, 50, 3))
    lines = []
    for _ in range(60):
        line = [0, 1]
        for _ in range(200):
            line.append(int(following[line[-2], line[-1], rng.integers(3)]))
        lines.append(np.array(line))
    got = kneser_ney(lines[:50], lines[50:], 50)
    assert got["trigram"] < got["bigram"] < got["unigram"]


def test_large_vocabulary_and_two_million_tokens_take_seconds() -> None:
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.zipf(1.3, size=2_000_000) - 1, 131_071).reshape(-1, 500)
    began = time.perf_counter()
    got = kneser_ney(tokens, tokens[:100], 131_072)
    assert time.perf_counter() - began < 20  # 2 s alone; a table of V x V entries would not fit at all
    assert all(math.isfinite(value) for value in got.values())


@pytest.mark.parametrize(
    ("train", "validation", "size", "words"),
    [
        ([], [[1, 2]], 4, "train_sequences hold no tokens"),
        ([[1, 2]], [[1]], 4, "no token with another before it"),
        ([[1, 2]], [], 4, "no token with another before it"),
        ([[1, 4]], [[1, 2]], 4, "train_sequences hold ids from 1 to 4"),
        ([[1, 2]], [[-1, 2]], 4, "validation_sequences hold ids from -1"),
        ([[1, 2]], [[1, 2]], 1 << 22, "vocab_size="),
        ([[1, 2]], [[1, 2]], 0, "vocab_size=0"),
    ],
)
def test_wrong_input_is_refused(train: list[list[int]], validation: list[list[int]], size: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        kneser_ney(arrays(train), arrays(validation), size)
