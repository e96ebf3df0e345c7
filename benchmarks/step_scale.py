"""What grows with the number of ranks in a step, in one rank of a world whose other ranks do not exist.

    python -m benchmarks.step_scale --out step_scale.json

Timed: the processor seconds of one rank for its rows in the two sums of a step, and for comparing the ranks, with a
process group that sends nothing. A ring's and the network's times are not in it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.plan.trace import start_fake_world
from parallel.reduce import PendingSum, own_row, sum_in_one_collective, sum_in_rank_order
from train.launch_config import LaunchConfig
from train.rank_usage import RankUsage
from train.stragglers import StragglerWatch

WORLDS = (1024, 10240)
NUMBERS = 9  # of a rank in the first sum: squared norm, losses, hidden norm, requests
USAGE = 3
REPEATS = 20


def in_a_loop(rows: Tensor) -> Tensor:
    """As `sum_in_rank_order`, row by row in Python: what a step did before."""
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for row in rows:
        total += row
    return total


def median_ms(action: Callable[[], Any]) -> float:
    """Of the processor milliseconds of a call."""
    took = []
    for _ in range(REPEATS):
        began = time.process_time()
        action()
        took.append(time.process_time() - began)
    return round(1e3 * sorted(took)[REPEATS // 2], 3)


def measure(world: int) -> list[float]:
    """The rows of the table, for a world of so many ranks."""
    start_fake_world(0, world)
    try:
        numbers, usage = torch.randn(NUMBERS), torch.rand(USAGE, dtype=torch.float64) + 1
        rows, of_ranks = torch.randn(world, NUMBERS, dtype=torch.float64), torch.rand(world, USAGE).double() + 1
        watch = StragglerWatch(LaunchConfig(), num_stages=8)

        def compare() -> None:
            found = RankUsage.of(of_ranks)
            watch.ratios(found.own_seconds)
            watch.see(found.own_seconds)

        return [
            8e-3 * rows.numel(),
            median_ms(lambda: sum_in_one_collective(numbers)),
            median_ms(lambda: sum_in_rank_order(rows)),
            median_ms(lambda: in_a_loop(rows)),
            8e-3 * of_ranks.numel(),
            median_ms(lambda: PendingSum(own_row(usage)).wait()),
            median_ms(compare),
        ]
    finally:
        dist.destroy_process_group()


NAMES = (
    "rows of the first sum, kB",
    "writing and adding them, CPU ms",
    "of this adding in the order of ranks, CPU ms",
    "the same in a Python loop, as before, CPU ms",
    "rows of seconds, waits and memory, kB",
    "writing and reading them, CPU ms",
    "comparing the ranks, CPU ms",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--machine", default="", help="conditions, for docs/measurements")
    parser.add_argument("--out", type=Path, help="file for docs/measurements")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = [measure(world) for world in WORLDS]
    measurement = {
        "name": "What grows with the number of ranks in a step",
        "date": time.strftime("%Y-%m-%d"),
        "machine": options.machine,
        "command": "python -m benchmarks.step_scale",
        "commit": None,
        "columns": ["what, of one rank", *(f"{world:,} ranks" for world in WORLDS)],
        "rows": [[name, *(round(value, 3) for value in values)] for name, *values in zip(NAMES, *found, strict=True)],
        "notes": [f"Median of {REPEATS} calls in one rank of a world whose process group sends nothing."],
    }
    print(json.dumps(measurement, indent=1))
    if options.out:
        options.out.write_text(json.dumps(measurement, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
