"""Heartbeats of ranks that wait and of ranks that compute, for tests of the diagnosis."""

from __future__ import annotations

from dataclasses import replace

from parallel.watchdog.events import Event, RankState, SpanKind
from parallel.watchdog.heartbeats import Heartbeat

NOW = 1000.0
FORWARD = Event(SpanKind.FORWARD, micro_batch=1)
WAITING = Heartbeat(
    rank=0,
    count=30,
    timestamp=NOW - 1,
    step=12,
    sequence=70,
    state=RankState.WAITING,
    event=Event(SpanKind.EXPERT_DISPATCH, layer=3),
    ranks="",
    phase=FORWARD,
    last_wait=Event(SpanKind.WEIGHT_ALL_GATHER, module="layers.3"),
    idle_seconds=30.0,
    slow_seconds_ago=float("inf"),
    machine="host/1",
    pid=40,
)
WORKING = replace(WAITING, state=RankState.WORKING, event=FORWARD, phase=None, sequence=68)


def heartbeats(*given: Heartbeat) -> dict[int, Heartbeat]:
    """Rank → its heartbeat, as the store would return them."""
    return {rank: replace(heartbeat, rank=rank, pid=40 + rank) for rank, heartbeat in enumerate(given)}
