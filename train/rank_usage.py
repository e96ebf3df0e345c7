"""What each rank takes for a step: seconds, waits for other ranks, memory."""

# W ranks

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from parallel.device import peak_memory_gib
from parallel.watchdog.spans import take_blocked_seconds


@dataclass(frozen=True)
class RankUsage:
    """Of each rank, from the sum of gradient norms of the step before to that of this step; the same on every rank.

    In a start's first step from its beginning. Seconds and waits between two steps, as in a validation, do not count;
    the peak of memory includes them.
    """

    seconds: np.ndarray  # [W]
    blocked_seconds: np.ndarray  # [W] of these, in waits for other ranks
    memory_gib: np.ndarray  # [W] peak

    @classmethod
    def of(cls, rows: Tensor) -> RankUsage:
        """From the numbers of each rank's `UsageMeter.take`: [W, 3] on the host."""
        return cls(*map(np.array, rows.T.tolist()))

    @property
    def own_seconds(self) -> np.ndarray:
        """Outside waits for other ranks; [W]."""
        return np.maximum(self.seconds - self.blocked_seconds, 0.0)

    @property
    def blocked_share(self) -> float:
        """The mean over ranks; 0 in one process, which waits for nobody."""
        return float((self.blocked_seconds / self.seconds).mean()) if len(self.seconds) > 1 else 0.0


class UsageMeter:
    """Measures this rank inside steps, from one `take` to the next."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = self.blocked_seconds = self._begun = 0.0

    def begin_step(self) -> None:
        """After that of the spans, which forget the waits between two steps."""
        self._begun = time.perf_counter()

    def end_step(self) -> None:
        """What follows does not count, until the next step begins."""
        now = time.perf_counter()
        self.seconds += now - self._begun
        self.blocked_seconds += take_blocked_seconds()
        self._begun = now

    def take(self) -> Tensor:
        """[seconds, of these blocked, peak memory in GiB] since the last call: [3] float64 on the host.

        On a GPU call it where the host has just waited for the device: the blocked seconds are read from there.
        """
        self.end_step()
        taken = torch.tensor([self.seconds, self.blocked_seconds, peak_memory_gib(self.device)], dtype=torch.float64)
        self.seconds = self.blocked_seconds = 0.0
        return taken
