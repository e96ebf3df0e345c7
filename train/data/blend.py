"""Which corpus each global sample comes from: weighted mixtures, constant or moving, in stages by tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from train.data.stages import Segment

# Samples after which a mixture's pattern repeats: 10 MB in memory for any length of run. In a block each corpus is
# about one sample from its share, so a run is within a millionth of it.
BLOCK = 1 << 20
GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, fill [0, 1) more evenly than any other number's
RUN = 4096  # samples of a ramp that are computed at once; after each of these the number from each corpus is kept


@cache
def blending() -> Callable[..., Any]:
    """megatron-core's `build_blending_indices`, from its compiled file alone: its package is seconds of imports."""
    package = find_spec("megatron")
    for folder in (package and package.submodule_search_locations) or ():
        spec = PathFinder.find_spec("helpers_cpp", [str(Path(folder, "core", "datasets"))])
        if spec is not None and spec.loader is not None:
            module = module_from_spec(spec)
            spec.loader.exec_module(module)
            return module.build_blending_indices  # type: ignore[no-any-return]
    from train.data.megatron import build_blending_indices  # another version keeps it elsewhere

    return build_blending_indices  # type: ignore[no-any-return]


class Picker(Protocol):
    """Chooses the corpus of each of consecutive samples."""

    def locate(self, index: int) -> tuple[int, int]:
        """Sample → (corpus, sample number within that corpus)."""

    def drawn(self, count: int) -> np.ndarray:
        """Samples of each corpus among the first `count`, int64 [corpora]."""


class Blend:
    """Samples of several corpora in fixed shares, by Megatron's greedy blending.

    Only corpora with a share above 0 are blended: ties go to the first one, which would get a sample at share 0 too.
    """

    def __init__(self, weights: list[float]) -> None:
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        drawn = np.flatnonzero(shares).astype(np.int16)
        chosen = np.zeros(BLOCK, dtype=np.int16)
        self._number = np.zeros(BLOCK, dtype=np.int64)
        blending()(chosen, self._number, shares[drawn], len(drawn), BLOCK, False)
        self._corpus = drawn[chosen]
        self._totals = np.bincount(self._corpus, minlength=len(shares))

    def locate(self, index: int) -> tuple[int, int]:
        block, offset = divmod(index, BLOCK)
        corpus = int(self._corpus[offset])
        return corpus, block * int(self._totals[corpus]) + int(self._number[offset])

    def drawn(self, count: int) -> np.ndarray:
        blocks, rest = divmod(count, BLOCK)
        return blocks * self._totals + np.bincount(self._corpus[:rest], minlength=len(self._totals))


class Ramp:
    """A given number of samples whose shares move linearly from ``old`` to ``new``.

    The corpus of a sample follows from its number alone: a sequence that fills [0, 1) evenly, here the multiples of the
    golden ratio, is looked up in the sums of the shares at that sample. Any stretch of n samples is then within a few
    samples of its shares, where random numbers would be √n away.
    """

    def __init__(self, old: list[float], new: list[float], samples: int) -> None:
        start, end = (np.asarray(weights, dtype=np.float64) / sum(weights) for weights in (old, new))
        self._corpora = len(start)
        self._corpus = np.empty(samples, dtype=np.int16)
        counts = []
        for first in range(0, samples, RUN):
            run = self._corpus[first : first + RUN]
            numbers = np.arange(first, first + len(run), dtype=np.float64) + 0.5
            run[:] = _corpora(start, end, numbers / samples, numbers * GOLDEN % 1.0)
            counts.append(np.bincount(run, minlength=self._corpora))
        self._before = np.concatenate([np.zeros((1, self._corpora), dtype=np.int64), np.cumsum(counts, 0)])

    def locate(self, index: int) -> tuple[int, int]:
        corpus = int(self._corpus[index])
        return corpus, int(self.drawn(index)[corpus])

    def drawn(self, count: int) -> np.ndarray:
        run = count // RUN
        return self._before[run] + self._count(run * RUN, count)

    def _count(self, first: int, stop: int) -> np.ndarray:
        return np.bincount(self._corpus[first:stop], minlength=self._corpora)


def _corpora(start: np.ndarray, end: np.ndarray, middles: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The corpora, int16 [samples], that ``points`` in [0, 1) fall on at ``middles`` of a ramp between two shares."""
    corpus = np.zeros(len(points), dtype=np.int16)
    for last in range(len(start) - 1):  # shares of the corpora 0 … last, summed
        low, high = start[: last + 1].sum(), end[: last + 1].sum()
        corpus += points >= low + (high - low) * middles
    return corpus


class Single:
    """Samples of one corpus."""

    def locate(self, index: int) -> tuple[int, int]:
        return 0, index

    def drawn(self, count: int) -> np.ndarray:
        return np.array([count])


@dataclass(frozen=True)
class _Piece:
    start: int  # first global sample
    length: int  # tokens of a sample
    picker: Picker
    before: np.ndarray  # samples of this length that each corpus had given earlier, int64 [corpora]

    def after(self, sample: int, length: int) -> np.ndarray:
        """What each corpus had given before a later ``sample``, in samples of ``length``, rounded up."""
        given = self.before + self.picker.drawn(sample - self.start)
        return given if length == self.length else -(-given * self.length // length)


def shares_of(weights: list[float], parts: Sequence[Segment]) -> list[list[float]]:
    """The share of each corpus in the segments, at its largest where the mixture moves."""
    found, table = [], weights
    for part in parts:
        new = (part.stage.weights if part.stage is not None else []) or table
        found.append([max(pair) for pair in zip(table, new, strict=True)] if part.ramp else new)
        table = new
    return found


class Mixture:
    """A sequence of blends; each corpus continues where the previous one left it.

    In a segment of another sample length a corpus continues at the number of samples of the new length that hold the
    tokens that it has given.
    """

    def __init__(self, weights: list[float], parts: Sequence[Segment]) -> None:
        self._pieces: list[_Piece] = []
        self._corpora = len(weights)
        blends: dict[tuple[float, ...], Picker] = {}
        table = weights
        for part in parts:
            new = (part.stage.weights if part.stage is not None else []) or table
            if part.ramp and self._corpora > 1:
                self._add(part.start, part.length, Ramp(table, new, part.ramp))
            table = new
            if tuple(table) not in blends:
                blends[tuple(table)] = Blend(table) if self._corpora > 1 else Single()
            self._add(part.start + part.ramp, part.length, blends[tuple(table)])

    def _add(self, start: int, length: int, picker: Picker) -> None:
        """Let ``picker`` choose from sample ``start`` on."""
        before = np.zeros(self._corpora, dtype=np.int64)
        if self._pieces:
            before = self._pieces[-1].after(start, length)
        self._pieces.append(_Piece(start, length, picker, before))

    def locate(self, index: int) -> tuple[int, int, int]:
        """Global sample → (corpus, sample number within that corpus since the start of training, tokens per sample).

        The number counts samples of that length.
        """
        piece = next(piece for piece in reversed(self._pieces) if piece.start <= index)
        corpus, number = piece.picker.locate(index - piece.start)
        return corpus, number + int(piece.before[corpus]), piece.length
