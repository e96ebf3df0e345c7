"""Heartbeats of ranks that wait and of ranks that compute, for tests of the diagnosis."""

from __future__ import annotations

from dataclasses import replace

from parallel.watchdog.diagnosis import WAITS, WORKS, Heartbeat

NOW = 1000.0
WAITING = Heartbeat(
    rank=0,
    beat=30,
    wall=NOW - 1,
    step=12,
    sequence=70,
    state=WAITS,
    what="expert dispatch, layer 3",
    group="ep",
    phase="forward of micro-batch 1",
    among="",
    before="gathered weights, layers.3",
    still_seconds=30.0,
    slow_seconds_ago=float("inf"),
    machine="host/1",
    pid=40,
)
WORKING = replace(WAITING, state=WORKS, what="forward of micro-batch 1", group="", phase="", sequence=68)


def heartbeats(*given: Heartbeat) -> dict[int, Heartbeat]:
    """Rank → its heartbeat, as the store would return them."""
    return {rank: replace(heartbeat, rank=rank, pid=40 + rank) for rank, heartbeat in enumerate(given)}
