"""The table of all recorded trials of injected faults: `python -m tests.support.fault_table` writes the measurement.

Trials are lines of runs/sdc-faults/<layout>.jsonl, which `tests/train/sdc/test_faults.py` appends to and goes on from.
"""

from __future__ import annotations

import json
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "runs" / "sdc-faults"
COMMAND = "make test-long TESTS=tests/train/sdc/test_faults.py"


def read(folder: Path = RECORDS) -> list[dict[str, Any]]:
    """All records, of trials and of clean steps."""
    return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in path.read_text().splitlines()]


def rows(trials: list[dict[str, Any]]) -> list[list[Any]]:
    """Place, with or without replicas → faults, and how many were noticed, when, and with the right rank."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for trial in trials:
        if trial["struck"]:
            grouped[trial["place"], "dp 2" if trial["layout"].startswith("dp") else "dp 1"].append(trial)
    table = []
    for (place, replicas), struck in sorted(grouped.items()):
        found = [trial for trial in struck if trial["noticed"] and trial["kind"] != "not finite"]
        same = sum(trial["noticed"] == trial["struck"] for trial in found)
        named = sum(trial["rank"] in trial["suspects"] for trial in found)
        infinite = sum(trial["kind"] == "not finite" for trial in struck)
        harmless = sum(trial["harmless"] for trial in struck)
        table.append([place, replicas, len(struck), len(found), same, len(found) - same, named, infinite, harmless])
    return table


def measurement(records: list[dict[str, Any]], machine: str) -> dict[str, Any]:
    """The records as a file of docs/measurements."""
    trials = [one for one in records if "place" in one]
    clean = sum(one["clean_steps"] for one in records if "clean_steps" in one)
    layouts = sorted({one["layout"] for one in trials})
    return {
        "name": "Injected faults: noticed by comparing checksums",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "command": COMMAND,
        "commit": None,
        "columns": [
            "place", "replicas", "faults that changed bits", "found", "in the same step", "in the next step",
            "struck rank named", "ended as not finite", "no effect on the state",
        ],
        "rows": rows(trials),
        "notes": [
            f"{len(trials)} faults drawn, in {len(layouts)} layouts: {', '.join(layouts)}. "
            f"{clean} clean steps raised no alarm.",
            "Each fault is transient. Of the results of computations one operator call a step is repeated: a transient "
            "fault there is found if it strikes that call.",
        ],
    }  # fmt: skip


def write(records: list[dict[str, Any]], machine: str = "2 shared cores") -> Path:
    """Write the measurement of today; returns its path."""
    found = measurement(records, machine)
    path = ROOT / "docs" / "measurements" / f"{found['date']}-sdc-faults.json"
    path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    return path


if __name__ == "__main__":
    print(write(read()))
