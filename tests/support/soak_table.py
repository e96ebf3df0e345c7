"""The measurement of a soak: its faults by kind, what they cost, and the ledger of wall time."""

from __future__ import annotations

import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from launch.supervisor.ledger import describe
from tests.support.soak import ROOT, Planted

COMMAND = "make test-long TESTS=tests/launch/supervisor/test_soak.py"
KEPT = ROOT / "runs" / "soak"  # the run folder without its checkpoints, to look at


def next_step(fault: Planted, journal: Sequence[dict[str, Any]]) -> float | None:
    """Seconds from the fault to the first step that a later start finished."""
    starts = {line["incarnation"]: line["time"] for line in journal if line["event"] == "start"}
    for line in journal:
        later = line["event"] == "end" and line["incarnation"] > fault.incarnation
        if later and line["first_step_seconds"] is not None:
            return float(starts[line["incarnation"]] + line["first_step_seconds"] - fault.planted)
    return None


def rows(planted: Sequence[Planted], journal: Sequence[dict[str, Any]]) -> list[list[Any]]:
    """Kind → faults, found causes, median seconds to the end of all ranks and to the next finished step."""
    grouped: dict[str, list[Planted]] = defaultdict(list)
    for one in planted:
        grouped[one.kind].append(one)
    found = []
    for kind, faults in sorted(grouped.items()):
        causes = Counter(fault.cause for fault in faults)
        seconds = [took for fault in faults if (took := next_step(fault, journal)) is not None]
        ended = median(fault.ended - fault.planted for fault in faults)
        text = ", ".join(f"{cause} {count}" for cause, count in sorted(causes.items()))
        found.append([kind, len(faults), text, round(ended, 1), round(median(seconds), 1), round(max(seconds), 1)])
    own = {fault.incarnation for fault in planted}
    ends = [line for line in journal if line["event"] == "end" and line["cause"] != "done"]
    others = Counter(line["cause"] for line in ends if line["incarnation"] not in own)
    text = ", ".join(f"{cause} {count}" for cause, count in sorted(others.items()))
    return [*found, ["a node that fails every time, a full disk's later starts", others.total(), text, *[None] * 3]]


def write(planted: Sequence[Planted], journal: list[dict[str, Any]], folder: Path) -> Path:
    """Write today's measurement and keep the run folder; returns the measurement's path."""
    totals = journal[-1]
    date = datetime.now(UTC).date().isoformat()
    found = {
        "name": "Soak: an unattended run with faults of all kinds",
        "date": date,
        "machine": "2 shared cores",
        "command": COMMAND,
        "commit": None,
        "columns": [
            "fault", "times", "found as", "s to the end of all ranks", "s to the next finished step", "at most",
        ],
        "rows": rows(planted, journal),
        "notes": [
            f"{len(planted)} faults drawn at random and planted while the run trained or started, without a human "
            f"step; its losses, norms and state hashes of all steps equal those of an undisturbed run.",
            *describe(totals),
            "Medians; a hang waits for parallel.timeout_seconds=10, a lost node for launch.node_timeout=30, a slow "
            "rank for 5 steps in a row.",
        ],
    }  # fmt: skip
    path = ROOT / "docs" / "measurements" / f"{date}-soak.json"
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    shutil.rmtree(KEPT, ignore_errors=True)
    shutil.copytree(folder, KEPT, ignore=shutil.ignore_patterns("checkpoints"))
    return path
