"""Interpolated Kneser-Ney n-gram models of the same tokens, as a baseline of the validation loss.

Source: Kneser and Ney 1995, interpolated as in Chen and Goodman 1999, with one absolute discount for each
order, n1 / (n1 + 2 n2), where n1 and n2 are how many n-grams were counted once and twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from longcat.errors import ConfigError

_LARGEST_VOCABULARY = 1 << 21
_DISCOUNT_WITHOUT_SINGLES = 0.5  # the estimate would be 0, and unseen tokens would have no probability


def kneser_ney(
    train_sequences: Iterable[np.ndarray], validation_sequences: Iterable[np.ndarray], vocab_size: int
) -> dict[str, float]:
    """Mean cross-entropy of n-gram models in nats per predicted token.

    Predicted are all tokens of a validation sequence but its first, as a language model predicts them; the
    second token has one token of context, so the trigram model uses its bigrams there. No n-gram crosses a
    border of sequences.

    Args:
        train_sequences: token ids, integers [length] each.
        validation_sequences: the same, at least one of them with two tokens.
        vocab_size: ids are below it.

    Returns:
        `unigram`, `bigram`, `trigram` in nats, and `train_tokens`.

    Raises:
        ConfigError: nothing to count or to predict, or an id outside the vocabulary.
    """
    model = NgramModel(train_sequences, vocab_size)
    tokens, position = _joined(validation_sequences, vocab_size, "validation_sequences")
    after_one = np.flatnonzero(position == 1)
    after_two = np.flatnonzero(position >= 2)
    predicted = np.concatenate((after_one, after_two))
    if predicted.size == 0:
        raise ConfigError("validation_sequences have no token with another before it; give longer ones")
    word, previous = tokens[predicted], tokens[predicted - 1]
    bigram = model.bigram(previous, word)
    trigram = model.trigram(tokens[after_two - 2], tokens[after_two - 1], tokens[after_two])
    return {
        "unigram": _nats(model.unigram(word)),
        "bigram": _nats(bigram),
        "trigram": _nats(np.concatenate((bigram[: after_one.size], trigram))),
        "train_tokens": int(model.num_tokens),
    }


class NgramModel:
    """Unigram, bigram and trigram models from one pass over sequences of ids.

    All methods take and give arrays of one shape: ids in, probabilities (float64) out, which sum to 1 over
    `word`.
    """

    def __init__(self, sequences: Iterable[np.ndarray], vocab_size: int) -> None:
        if not 1 <= vocab_size <= _LARGEST_VOCABULARY:
            raise ConfigError(f"vocab_size={vocab_size} must lie between 1 and {_LARGEST_VOCABULARY}")
        self._vocab_size = vocab_size
        tokens, position = _joined(sequences, vocab_size, "train_sequences")
        self.num_tokens = tokens.size
        if tokens.size == 0:
            raise ConfigError("train_sequences hold no tokens; give at least one")
        singles = np.bincount(tokens, minlength=vocab_size)
        self._unigram = _single(singles)
        second, third = np.flatnonzero(position >= 1), np.flatnonzero(position >= 2)
        pairs, pair_counts = _counted(tokens[second - 1] * vocab_size + tokens[second])
        keys = (tokens[third - 2] * vocab_size + tokens[third - 1]) * vocab_size + tokens[third]
        triples, triple_counts = _counted(keys)
        # Lower orders count in how many contexts a word was seen, not how often.
        self._continued = _single(np.bincount(pairs % vocab_size, minlength=vocab_size))
        inner, inner_counts = _counted(triples % (vocab_size * vocab_size))
        self._pairs = _Table.build(pairs, pair_counts, vocab_size)
        self._inner = _Table.build(inner, inner_counts, vocab_size)
        self._triples = _Table.build(triples, triple_counts, vocab_size)

    def unigram(self, word: np.ndarray) -> np.ndarray:
        """p(word), discounted and mixed with the uniform distribution."""
        return self._unigram[word]

    def bigram(self, previous: np.ndarray, word: np.ndarray) -> np.ndarray:
        """p(word | previous)."""
        return self._pairs.interpolated(previous, word, self._continued[word])

    def trigram(self, earlier: np.ndarray, previous: np.ndarray, word: np.ndarray) -> np.ndarray:
        """p(word | earlier, previous)."""
        lower = self._inner.interpolated(previous, word, self._continued[word])
        return self._triples.interpolated(earlier * self._vocab_size + previous, word, lower)


@dataclass
class _Table:
    """Counts of (context, word), sorted by key = context · V + word, and of each context."""

    keys: np.ndarray  # int64 [n-grams]
    counts: np.ndarray  # int64 [n-grams]
    contexts: np.ndarray  # int64 [contexts]
    totals: np.ndarray  # int64 [contexts], sum of counts after the context
    kinds: np.ndarray  # int64 [contexts], different words after it
    discount: float
    vocab_size: int

    @classmethod
    def build(cls, keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> _Table:
        contexts, first, kinds = np.unique(keys // vocab_size, return_index=True, return_counts=True)
        totals = np.add.reduceat(counts, first) if keys.size else counts
        return cls(keys, counts, contexts, totals, kinds, _discount(counts), vocab_size)

    def interpolated(self, context: np.ndarray, word: np.ndarray, lower: np.ndarray) -> np.ndarray:
        """Discounted share of `word` after `context`, plus the discounted mass times `lower`."""
        if self.keys.size == 0:
            return lower
        count = _look_up(self.keys, self.counts, context * self.vocab_size + word)
        total = _look_up(self.contexts, self.totals, context)
        kinds = _look_up(self.contexts, self.kinds, context)
        seen = np.maximum(count - self.discount, 0.0) + self.discount * kinds * lower
        return np.where(total > 0, seen / np.maximum(total, 1), lower)


def _joined(sequences: Iterable[np.ndarray], vocab_size: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """All ids concatenated, and the position of each in its sequence; both int64 [tokens]."""
    parts = [np.asarray(sequence, dtype=np.int64).reshape(-1) for sequence in sequences]
    if not parts:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    tokens = np.concatenate(parts)
    if tokens.size and not 0 <= int(tokens.min()) <= int(tokens.max()) < vocab_size:
        raise ConfigError(f"{name} hold ids from {tokens.min()} to {tokens.max()}, the vocabulary is {vocab_size}")
    lengths = np.array([part.size for part in parts])
    starts = np.cumsum(lengths) - lengths
    return tokens, np.arange(tokens.size) - np.repeat(starts, lengths)


def _counted(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    distinct, counts = np.unique(keys, return_counts=True)
    return distinct, counts.astype(np.int64)


def _single(counts: np.ndarray) -> np.ndarray:
    """Probabilities of single words from counts [V], the discounted mass spread evenly."""
    size, total = counts.size, int(counts.sum())
    if total == 0:
        return np.full(size, 1.0 / size)
    discount = _discount(counts)
    spread = discount * np.count_nonzero(counts) / size
    return (np.maximum(counts - discount, 0.0) + spread) / total


def _discount(counts: np.ndarray) -> float:
    once, twice = int(np.count_nonzero(counts == 1)), int(np.count_nonzero(counts == 2))
    return once / (once + 2 * twice) if once else _DISCOUNT_WITHOUT_SINGLES


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`values` where `keys` (sorted, not empty) equals `wanted`, 0 elsewhere."""
    position = np.minimum(np.searchsorted(keys, wanted), keys.size - 1)
    return np.where(keys[position] == wanted, values[position], 0)


def _nats(probabilities: np.ndarray) -> float:
    return float(-np.log(probabilities).mean())
