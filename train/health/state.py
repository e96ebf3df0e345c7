"""What the health checks remember: part of every checkpoint and of the state hash."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from train.health.ranges import SampleRanges


@dataclass
class HealthState:
    """Windows, actions and skipped samples. The same on every rank."""

    losses: list[float] = field(default_factory=list)  # logarithms of the last finite losses, oldest first
    norms: list[float] = field(default_factory=list)  # of the last finite gradient norms
    hidden: list[float] = field(default_factory=list)  # of the last finite hidden norms
    strikes: list[int] = field(default_factory=list)  # steps of the skips and rollbacks that still count
    skipped: SampleRanges = field(default_factory=SampleRanges)  # samples of the present data that rollbacks left out
    idle: dict[tuple[int, int], int] = field(default_factory=dict)  # (layer, FFN expert) → first step without a token

    def as_json(self) -> dict[str, Any]:
        """For state.json; floats keep their bits."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "hidden": list(self.hidden),
            "strikes": list(self.strikes),
            "skipped": [list(pair) for pair in self.skipped.ranges],
            "idle": [[layer, expert, since] for (layer, expert), since in sorted(self.idle.items())],
        }

    def restore(self, stored: dict[str, Any] | None) -> None:
        """Take over what `as_json` returned, in place; None (checkpoints of before this state existed) empties it."""
        stored = stored or {}
        self.losses[:] = stored.get("losses", [])
        self.norms[:] = stored.get("norms", [])
        self.hidden[:] = stored.get("hidden", [])
        self.strikes[:] = stored.get("strikes", [])
        self.skipped.replace((start, stop) for start, stop in stored.get("skipped", []))
        self.idle.clear()
        self.idle.update({(layer, expert): since for layer, expert, since in stored.get("idle", [])})

    def forget(self, data: bool = False) -> None:
        """Empty the windows of loss and gradient norm; with ``data``, which begins anew, nothing is left out either."""
        self.losses.clear()
        self.norms.clear()
        if data:
            self.skipped.replace([])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(key, float64 or int64 tensor) of everything, for the state hash; without values a tensor adds nothing."""
        stored = self.as_json()
        for key in ("losses", "norms", "hidden"):
            yield key, torch.tensor(stored[key], dtype=torch.float64)
        for key in ("strikes", "skipped", "idle"):
            yield key, torch.tensor(stored[key], dtype=torch.int64).flatten()


def grown(stored: dict[str, Any] | None) -> dict[str, Any]:
    """The health state of a checkpoint that grew in depth: only the samples that are left out.

    A deeper model starts with a higher loss, which must not count as a spike, and has other experts.
    """
    return {"skipped": (stored or {}).get("skipped", [])}
