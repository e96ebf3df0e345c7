"""Planned peaks beside the allocator's of real ranks, for each layout; run as a program it writes the measurement.

python -m tests.launch.plan.peaks docs/measurements/2026-11-29-plan-peaks.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

from tests.launch.plan.allocations import measure, traced_with_routing
from tests.launch.plan.layouts import LAYOUTS, QUICK, Layout
from tests.support.distributed import run_ranks

RUNS = 4  # of a layout at most
LEAST, MOST = 0.98, 1.05  # planned over measured
LIMIT = 600.0  # seconds of a run


@dataclass(frozen=True)
class Compared:
    """One layout: the allocator's peak of each rank, and what was planned for it."""

    layout: Layout
    peaks: tuple[int, ...]  # bytes
    ratios: tuple[float, ...]  # planned over measured
    holds_state: bool  # no rank's modules have more bytes of weights and moments than planned

    @property
    def agrees(self) -> bool:
        return self.holds_state and all(LEAST <= ratio <= MOST for ratio in self.ratios)

    def __str__(self) -> str:
        return f"{self.layout}: {self.differences} %"

    @property
    def differences(self) -> str:
        return ", ".join(f"{100 * ratio - 100:+.2f}" for ratio in self.ratios)


def compare(layout: Layout) -> Compared:
    """Run a layout's ranks, and plan each given how its routers chose.

    gloo's thread may hold a message's tensor for a moment after the wait. So a peak that is too high is measured again,
    and the smallest counts.
    """
    measured = run_ranks(measure, layout.ranks, layout.overrides, timeout=LIMIT)
    (planned,) = run_ranks(traced_with_routing, 1, layout.overrides, measured, timeout=LIMIT)
    peaks = [real.peak for real in measured]
    for _ in range(RUNS - 1):
        if all(one.peak >= LEAST * peak for one, peak in zip(planned, peaks, strict=True)):
            break
        again = run_ranks(measure, layout.ranks, layout.overrides, timeout=LIMIT)
        peaks = [min(peak, real.peak) for peak, real in zip(peaks, again, strict=True)]
    ratios = tuple(one.peak / peak for one, peak in zip(planned, peaks, strict=True))
    holds_state = all(one.state >= real.state for one, real in zip(planned, measured, strict=True))
    return Compared(layout, tuple(peaks), ratios, holds_state)


def as_measurement(found: Sequence[Compared], command: str) -> dict[str, object]:
    """The content of a file of docs/measurements."""
    rows = [
        [
            one.layout.ranks,
            ", ".join(part.rpartition(".")[2] for part in one.layout.overrides) or "one of each",
            f"{max(one.peaks) / 2**20:.2f}",
            one.differences,
        ]
        for one in found
    ]
    agree = sum(one.agrees for one in found)
    return {
        "name": "Planned peaks against allocator bytes of real ranks",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{psutil.cpu_count()} shared cores, torch {torch.__version__.partition('+')[0]}",
        "command": command,
        "commit": None,
        "columns": ["ranks", "layout", "highest peak, MiB", "planned − measured of each rank, %"],
        "rows": rows,
        "notes": [f"{agree} of {len(found)} layouts lie within +5 % and -2 % on every rank"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path, help="file to write")
    target = parser.parse_args().target
    found = []
    for layout in (*QUICK, *LAYOUTS):
        found.append(compare(layout))
        print(found[-1], flush=True)
    content = as_measurement(found, f"python -m tests.launch.plan.peaks {target}")
    target.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
