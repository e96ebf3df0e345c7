"""The cost of a span and of a heartbeat: `python -m benchmarks.spans` prints a table and one JSON line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.heartbeats import HeartbeatStore
from parallel.watchdog.spans import wait_span
from parallel.watchdog.watchdog import Watchdog

COUNT = 100_000
EVENT = Event(SpanKind.EXPERT_DISPATCH, layer=3)


def microseconds(action: Callable[[], object], count: int) -> float:
    """The best of five runs, for each call."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count):
            action()
        best = min(best, time.perf_counter() - start)
    return best / count * 1e6


def span() -> None:
    with wait_span(EVENT):
        pass


def span_with_a_new_event() -> None:
    with wait_span(Event(SpanKind.EXPERT_DISPATCH, layer=3)):
        pass


def main() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    watchdog = Watchdog(HeartbeatStore(store, 0, 1), 600.0, print, Path("unused"))
    costs = {
        "span_us": microseconds(span, COUNT),
        "span_with_a_new_event_us": microseconds(span_with_a_new_event, COUNT),
        "nothing_us": microseconds(lambda: None, COUNT),
        "heartbeat_us": microseconds(lambda: watchdog.store.publish(watchdog.heartbeat()), 500),
    }
    for name, cost in costs.items():
        print(f"{name:32} {cost:8.2f}")
    print(json.dumps({name: round(cost, 3) for name, cost in costs.items()}))


if __name__ == "__main__":
    main()
