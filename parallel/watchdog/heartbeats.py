"""Heartbeats: what each rank last reported of itself, in the store of the process group."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from parallel.watchdog.events import Event, RankState
from parallel.watchdog.progress import GroupProgress

Result = TypeVar("Result")


@dataclass(frozen=True)
class Heartbeat:
    """What a rank reported of itself."""

    rank: int
    count: int  # of heartbeats so far: one that does not grow comes from a rank that has stopped
    timestamp: float  # seconds since 1970, by the rank's own clock
    step: int
    sequence: int  # spans so far: ranks that run the same program compare their progress by it
    state: RankState
    event: Event | None  # the innermost span's, None between spans
    ranks: str  # of the collective, or the peer, as `wait_graph.encode_ranks` writes them; "" is all
    phase: Event | None  # that of the span around it
    last_wait: Event | None  # the wait that ended last
    idle_seconds: float  # since a span was entered or left
    slow_seconds_ago: float  # since a slow span (writing a checkpoint) ended; 0 in one, infinite before the first
    machine: str
    pid: int
    groups: tuple[GroupProgress, ...] = ()  # what the device has done, on a GPU

    def to_json(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps({key: v.fields() if isinstance(v, Event) else v for key, v in values.items()})

    @staticmethod
    def from_json(text: str | bytes) -> Heartbeat:
        values: dict[str, Any] = json.loads(text)
        for key in ("event", "phase", "last_wait"):
            values[key] = None if values[key] is None else Event.parse(values[key])
        groups = tuple(GroupProgress(*group) for group in values.get("groups", ()))
        return Heartbeat(**values | {"state": RankState(values["state"]), "groups": groups})

    @property
    def is_waiting(self) -> bool:
        """Whether it waits for others, or did until its collective failed."""
        return self.state != RankState.WORKING

    @property
    def call(self) -> tuple[object, ...]:
        """Equal on ranks in the same call of a collective."""
        return self.step, self.phase, self.event, self.ranks

    @property
    def location(self) -> str:
        """`step 12, "expert dispatch, layer 3" (ep) during forward of micro-batch 1`: where the rank is."""
        if self.event is None:
            before = f'after "{self.last_wait.text}"' if self.last_wait else "before the first collective"
            return f"step {self.step}, {before}"
        is_working = self.state == RankState.WORKING
        last = f' after "{self.last_wait.text}"' if is_working and self.last_wait else ""
        return f"step {self.step}, {self.activity}{last}"

    @property
    def activity(self) -> str:
        """The event with its mesh axis and the phase around it."""
        if self.event is None:
            return "no span"
        axis = f" ({self.event.kind.axis})" if self.event.kind.axis else ""
        return f'"{self.event.text}"{axis}' + (f" during {self.phase.text}" if self.phase else "")


@dataclass(frozen=True)
class Announcement:
    """Why all ranks end: for people, and for exit.json, which the first rank to end writes, whichever that is."""

    message: str
    finding: dict[str, Any]


class HeartbeatStore:
    """Each rank writes its own key; few ranks read all (turns.py). Its own connections: training never waits for it.

    Args:
        incarnation: the same on all ranks of one start, and no other start's: a launcher's store outlives its ranks,
            and the diagnosis that ended earlier ones must not end these.

    The store is in torchrun's first agent, or in a process that `longcat train` starts; in rank 0 where ranks were
    started by something else: then it is lost with rank 0.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, incarnation: str = "0") -> None:
        self.rank, self.world_size = rank, world_size
        self.writing, self.reading = store.clone(), store.clone()  # type: ignore[attr-defined]
        self.prefix = f"watch/{incarnation}"
        self.diagnosis_key = f"{self.prefix}/diagnosis"
        self.known: dict[int, Heartbeat] = {}  # what was read last; replaced, never changed: threads read it
        self.at_rank_0 = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)

    @property
    def keys(self) -> list[str]:
        """Of all ranks' heartbeats."""
        return [self.key(rank) for rank in range(self.world_size)]

    def key(self, rank: int) -> str:
        """Of one rank's heartbeat."""
        return f"{self.prefix}/{rank}"

    def register(self, machine: str) -> None:
        """Let the ranks of this machine find this one, which has published. Raises what a lost store raises."""
        self.writing.append(self._machine_key(machine), f"{self.rank} ")

    def _machine_key(self, machine: str) -> str:
        return f"{self.prefix}/on/{machine}"

    def publish(self, heartbeat: Heartbeat) -> Announcement | None:
        """Write this rank's heartbeat and return the diagnosis if a rank has announced one.

        Raises what a lost store raises.
        """
        self.writing.set(self.key(self.rank), heartbeat.to_json())
        if not self.writing.check([self.diagnosis_key]):
            return None
        return Announcement(**json.loads(self.writing.get(self.diagnosis_key)))

    def announce(self, announcement: Announcement) -> None:
        """Tell all ranks to end, and why."""
        text = json.dumps(asdict(announcement))
        within(1.0, lambda: self.reading.set(self.diagnosis_key, text))

    def cache_rank_0(self) -> None:
        """Keep rank 0's heartbeat where the store would be lost with it."""
        if self.at_rank_0 and self.rank != 0 and self.writing.check([self.key(0)]):
            self.known = self.known | {0: self.heartbeat_of(0, self.writing)}

    def heartbeat_of(self, rank: int, store: dist.Store | None = None) -> Heartbeat:
        """A rank's newest heartbeat. Raises what a lost store raises."""
        return Heartbeat.from_json((store or self.reading).get(self.key(rank)))

    def read_machine(self, machine: str) -> dict[int, Heartbeat]:
        """The newest heartbeats of the ranks that have registered on a machine. Raises what a lost store raises."""
        key = self._machine_key(machine)
        if not self.reading.check([key]):
            return {}
        ranks = self.reading.get(key).split()
        texts = self.reading.multi_get([self.key(int(rank)) for rank in ranks])
        found = {heartbeat.rank: heartbeat for heartbeat in map(Heartbeat.from_json, texts)}
        self.known = self.known | found
        return found

    def read(self, seconds: float) -> dict[int, Heartbeat] | None:
        """Every rank's newest heartbeat; None if the store does not answer within ``seconds``."""
        answer = within(seconds, self._read)
        if answer is not None:
            self.known = answer
        return answer

    def _read(self) -> dict[int, Heartbeat]:
        # Two requests for all ranks; a key each only while some rank has published nothing yet
        keys = self.keys
        if not self.reading.check(keys):
            keys = [key for key in keys if self.reading.check([key])]
        texts = self.reading.multi_get(keys) if keys else []
        return {heartbeat.rank: heartbeat for heartbeat in map(Heartbeat.from_json, texts)}


def within(seconds: float, action: Callable[[], Result]) -> Result | None:
    """What ``action`` returns; None if it fails or takes longer. A store whose host is stopped never answers."""
    answer: list[Result] = []

    def call() -> None:
        try:
            answer.append(action())
        except (RuntimeError, OSError, ValueError):
            return

    thread = threading.Thread(target=call, daemon=True, name="watchdog-request")
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
    """Whether the rank's process is known to have ended; that can only be known on the same machine."""
    if heartbeat.machine != machine or not Path("/proc/self/stat").exists():
        return False
    try:
        state = Path(f"/proc/{heartbeat.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"
