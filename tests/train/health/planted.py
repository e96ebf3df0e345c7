"""Spikes that are planted in chosen samples: the gradient or the loss of their batch is scaled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import pytest

from train.objective import Divisors
from train.step import Stepper, StepSums

# A short run that finds planted spikes: windows of eight steps, judged from the fifth step on. A real norm of so small
# a batch may leave eight others by 10 σ
WATCHFUL = ["health.window=8", "health.sigmas=15"]


def plant(
    patch: pytest.MonkeyPatch,
    samples: Collection[int] = (),
    gradient: float = 1000.0,
    loss: float = 1.0,
    steps: Collection[int] = (),
) -> None:
    """Scale gradient (at most by its tokens) and loss of each global batch that begins with one of ``samples``.

    Or of each of ``steps``, whatever its samples are: a spike that the model causes.
    """
    backward: Callable[..., StepSums] = Stepper._backward

    def planted(self: Stepper, batches: list[Any], divisors: Divisors, use_mtp: bool) -> StepSums:
        first, step = self.state.health.skipped.place(self.state.counters.position), self.state.counters.step + 1
        if first not in samples and step not in steps:
            return backward(self, batches, divisors, use_mtp)
        tokens = max(1, round(divisors.valid_tokens / gradient))
        local = backward(self, batches, dataclasses.replace(divisors, valid_tokens=tokens), use_mtp)
        local.sums[0] *= loss
        return local

    patch.setattr(Stepper, "_backward", planted)
