"""Ranks that take longer than the others of their pipeline stage, step after step."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from parallel.reduce import all_gather_object
from train.health.events import EventKind, HealthEvent
from train.launch_config import LaunchConfig


@dataclass(frozen=True)
class Straggler:
    """A rank whose own time has stood out for many steps."""

    rank: int
    host: str
    ratio: float  # of its own time to the median of its stage, in the last of these steps
    steps: int

    def __str__(self) -> str:
        return (
            f"rank {self.rank} on {self.host} has been slower than the others of its stage for {self.steps} steps: "
            f"{self.ratio:.1f} times the median time outside exchanges"
        )

    def event(self, step: int) -> HealthEvent:
        """Its line in health.jsonl."""
        fields = {"rank": self.rank, "host": self.host, "ratio": self.ratio, "steps": self.steps}
        return HealthEvent(step, EventKind.straggler, f"step {step}: {self}", fields)


def as_finding(found: Sequence[Straggler]) -> dict[str, object]:
    """For exit.json, which decides where the next start runs."""
    return {"ranks": [{"rank": one.rank, "host": one.host} for one in found], "steps": found[0].steps}


@dataclass
class StragglerWatch:
    """Compares the seconds in which ranks do not wait for others; ranks of other stages have other work.

    Only waits that are spans are taken off: a rank that delays the others only inside FSDP's all-reduces over dp, or
    DeepSpeed's communication, makes them look as slow as itself.
    """

    config: LaunchConfig
    num_stages: int
    slow_steps: dict[int, int] = field(default_factory=dict)  # rank → steps in a row

    def ratios(self, own_seconds: np.ndarray) -> np.ndarray:
        """Each rank's seconds over the median of its stage, of an even number the lower one; [ranks]."""
        by_stage = own_seconds.reshape(self.num_stages, -1)  # the pipeline is the outermost mesh axis
        middle = np.sort(by_stage, 1)[:, (by_stage.shape[1] - 1) // 2]
        return (by_stage / np.maximum(middle, 1e-9)[:, None]).reshape(-1)

    def see(self, own_seconds: np.ndarray) -> list[tuple[int, float]]:
        """The ranks (and ratios) that have now been slow for so many steps in a row; each is named once a row."""
        ratios, limit = self.ratios(own_seconds), self.config.straggler_factor
        slow = set(np.flatnonzero(ratios > limit).tolist()) if limit else set()
        self.slow_steps = {rank: self.slow_steps.get(rank, 0) + 1 for rank in slow}
        return [(rank, float(ratios[rank])) for rank in sorted(slow) if self.slow_steps[rank] == self.steps]

    @property
    def steps(self) -> int:
        return self.config.straggler_steps


def name_hosts(found: list[tuple[int, float]], steps: int) -> list[Straggler]:
    """With the hosts; a collective where any rank is named, which all ranks know alike."""
    if not found:
        return []
    hosts = all_gather_object(socket.gethostname())
    return [Straggler(rank, hosts[rank], ratio, steps) for rank, ratio in found]
