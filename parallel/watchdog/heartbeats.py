"""The ranks' signs of life, on the store that they met at."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from parallel.watchdog.diagnosis import Heartbeat

Result = TypeVar("Result")


class HeartbeatStore:
    """Each rank writes its own key; who has a question reads all. Connections of its own: training waits for none.

    The store lives in the first host's agent under torchrun and `longcat train`, and in rank 0 where ranks were started
    without an agent: then it is lost with rank 0.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self.writing, self.reading = store.clone(), store.clone()  # type: ignore[attr-defined]
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # an agent's store outlives its ranks
        self.keys = [f"watch/{attempt}/{number}" for number in range(world_size)]
        self.diagnose = f"watch/{attempt}/verdict"
        self.known: dict[int, Heartbeat] = {}  # what was read last
        self.at_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)

    def publish(self, heartbeat: Heartbeat) -> str | None:
        """Write this rank's sign; returns the verdict if one has been given. Raises what a lost store raises."""
        self.writing.set(self.keys[self.rank], heartbeat.text())
        if not self.writing.check([self.diagnose]):
            return None
        return self.writing.get(self.diagnose).decode()

    def announce(self, diagnose: str) -> None:
        """Tell all ranks to end, and why."""
        within(1.0, lambda: self.reading.set(self.diagnose, diagnose))

    def remember(self) -> None:
        """Keep rank 0's sign where it would take the store along."""
        if self.at_rank_0 and self.rank != 0 and self.writing.check(self.keys[:1]):
            self.known[0] = Heartbeat.parse(self.writing.get(self.keys[0]))

    def read(self, seconds: float) -> dict[int, Heartbeat] | None:
        """Every rank's newest sign; None if the store does not answer within ``seconds``."""
        answer = within(seconds, self._read)
        if answer is not None:
            self.known = dict(answer)  # `remember` goes on writing into it
        return answer

    def _read(self) -> dict[int, Heartbeat]:
        texts = self.reading.multi_get([key for key in self.keys if self.reading.check([key])])
        return {heartbeat.rank: heartbeat for heartbeat in map(Heartbeat.parse, texts)}


def within(seconds: float, action: Callable[[], Result]) -> Result | None:
    """What ``action`` returns; None if it fails or takes longer. A store whose host is stopped never answers."""
    answer: list[Result] = []

    def call() -> None:
        try:
            answer.append(action())
        except (RuntimeError, OSError, ValueError):
            return

    thread = threading.Thread(target=call, daemon=True, name="watch-asks")
    thread.start()
    thread.join(seconds)
    return answer[0] if answer else None


def this_machine() -> str:
    """`host/namespace`: where a process number means the same process."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return f"{socket.gethostname()}/{space}"


def has_ended(heartbeat: Heartbeat, machine: str) -> bool:
    """Whether the rank's process is known to be no more; only this machine's can be known."""
    if heartbeat.machine != machine or not Path("/proc/self/stat").exists():
        return False
    try:
        state = Path(f"/proc/{heartbeat.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"
