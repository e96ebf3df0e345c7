"""Which corpus each global sample comes from: weighted mixtures, in stages by tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

import numpy as np

from train.data.config import MixtureStage

# Samples after which a mixture's pattern repeats: 10 MB in memory for any length of run. In a block each corpus is
# about one sample from its share, so a run is within a millionth of it.
BLOCK = 1 << 20


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


class Blend:
    """Samples of several corpora in fixed shares, by Megatron's greedy blending."""

    def __init__(self, weights: list[float]) -> None:
        shares = np.asarray(weights, dtype=np.float64) / sum(weights)
        self._corpus = np.zeros(BLOCK, dtype=np.int16)
        self._number = np.zeros(BLOCK, dtype=np.int64)
        blending()(self._corpus, self._number, shares, len(shares), BLOCK, False)
        self._totals = np.bincount(self._corpus, minlength=len(shares))

    def locate(self, index: int) -> tuple[int, int]:
        """Global sample → (corpus, sample number within that corpus)."""
        block, offset = divmod(index, BLOCK)
        corpus = int(self._corpus[offset])
        return corpus, block * int(self._totals[corpus]) + int(self._number[offset])

    def drawn(self, count: int) -> np.ndarray:
        """Samples of each corpus among the first `count`, int64 [corpora]."""
        blocks, rest = divmod(count, BLOCK)
        return blocks * self._totals + np.bincount(self._corpus[:rest], minlength=len(self._totals))


@dataclass
class _Stage:
    start: int  # first global sample
    blend: Blend
    before: np.ndarray  # samples of each corpus drawn earlier, int64 [corpora]


class Mixture:
    """A sequence of blends; each corpus continues where the previous stage left it."""

    def __init__(self, weights: list[float], stages: list[MixtureStage], sequence_length: int) -> None:
        self._stages: list[_Stage] = []
        if len(weights) == 1:
            return
        starts = [0, *(-(-stage.start_tokens // sequence_length) for stage in stages)]
        tables = [weights, *(stage.weights for stage in stages)]
        before = np.zeros(len(weights), dtype=np.int64)
        for start, table in zip(starts, tables, strict=True):
            if self._stages:
                last = self._stages[-1]
                before = last.before + last.blend.drawn(start - last.start)
            self._stages.append(_Stage(start, Blend(table), before))

    def locate(self, index: int) -> tuple[int, int]:
        """Global sample → (corpus, sample number within that corpus since the start of training)."""
        if not self._stages:
            return 0, index
        stage = next(stage for stage in reversed(self._stages) if stage.start <= index)
        corpus, number = stage.blend.locate(index - stage.start)
        return corpus, number + int(stage.before[corpus])
