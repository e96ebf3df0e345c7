"""What a breadcrumb and a sign of life cost: `python -m benchmarks.crumbs` prints a table and one JSON line."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from parallel.watchdog.heartbeats import HeartbeatStore
from parallel.watchdog.spans import wait_span
from parallel.watchdog.watchdog import Watchdog

COUNT = 100_000


def microseconds(action: Callable[[], object], count: int) -> float:
    """The best of five runs, for each call."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(count):
            action()
        best = min(best, time.perf_counter() - start)
    return best / count * 1e6


def one_crumb() -> None:
    with wait_span("expert dispatch, layer 3", "ep"):
        pass


def named_crumb(layer: int = 3) -> None:
    with wait_span(f"expert dispatch, layer {layer}", "ep"):
        pass


def main() -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    kept = Watchdog(HeartbeatStore(store, 0, 1), 600.0, print, Path("unused"))
    costs = {
        "crumb_us": microseconds(one_crumb, COUNT),
        "crumb_with_a_formatted_name_us": microseconds(named_crumb, COUNT),
        "nothing_us": microseconds(lambda: None, COUNT),
        "sign_once_a_second_us": microseconds(lambda: kept.store.publish(kept.heartbeat()), 500),
    }
    for name, cost in costs.items():
        print(f"{name:32} {cost:8.2f}")
    print(json.dumps({name: round(cost, 3) for name, cost in costs.items()}))


if __name__ == "__main__":
    main()
