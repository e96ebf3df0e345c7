"""How `parallel.timeout_seconds` is divided: waiting, confirming that a rank has stopped, telling all and ending."""

from __future__ import annotations

from dataclasses import dataclass

SLOW_FACTOR = 6  # time-outs that ranks wait for a rank in a slow span (writing a checkpoint)
GROUP_FACTOR = 1.25  # time-outs until the process groups give up, for waits that no watchdog sees
HEARTBEATS_PER_SECOND = 2000  # that the store has to bear


@dataclass(frozen=True)
class Timing:
    """Intervals in seconds.

    Measured with 3 ranks on two idle cores: exit.json is written 0.02 s after it is confirmed that a rank has stopped
    (two readings, the diagnosis, writing), and the last process ends 0.2 s later. The rest of the reserve is for busy
    cores.
    """

    timeout: float
    heartbeat: float  # between heartbeats
    confirm: float  # a rank without a heartbeat for so long has stopped
    investigate: float  # a wait that is so long is looked into

    @classmethod
    def of(cls, timeout: float, world_size: int) -> Timing:
        heartbeat = max(min(1.0, timeout / 40), world_size / HEARTBEATS_PER_SECOND)
        confirm = max(2.5 * heartbeat, min(1.0, timeout / 5))
        ending = 3 * heartbeat + min(1.0, timeout / 5)
        return cls(timeout, heartbeat, confirm, max(timeout - confirm - ending, timeout / 2))

    @property
    def slow_limit(self) -> float:
        """How long ranks wait for a rank in a slow span."""
        return self.investigate + (SLOW_FACTOR - 1) * self.timeout


def max_wait_seconds(timeout_seconds: float) -> float:
    """How long a collective may wait for a rank that writes a checkpoint."""
    return timeout_seconds * SLOW_FACTOR * GROUP_FACTOR
