"""The page of a run of all parts, and the same as JSON in the form of docs/measurements."""

from __future__ import annotations

import json
import subprocess
from datetime import date
from pathlib import Path

from benchmarks.gpu.part import Row
from benchmarks.gpu.runner import PartResult, State
from benchmarks.gpu.session import ROOT

MET = {True: "yes", False: "**no**", None: ""}
COLUMNS = ["part", "what", "measured", "wanted", "met"]


def write(folder: Path, device: str, results: list[PartResult]) -> Path:
    """Write gpu_results.md and measurements/DATE-gpu.json below ``folder``; returns the page's path."""
    today, name = date.today().isoformat(), device_name(device)
    rows = [
        [one.part.name, row.what, row.measured, row.wanted, row.met]
        for one in results
        for row in one.rows or problem_rows(one)
    ]
    record = {
        "name": f"all parts of make gpu on {name}",
        "date": today,
        "machine": name,
        "command": f"python -m benchmarks.gpu --device {device}",
        "commit": commit(),
        "columns": COLUMNS,
        "rows": rows,
        "notes": [],
    }
    measurements = folder / "measurements"
    measurements.mkdir(parents=True, exist_ok=True)
    path = measurements / f"{today}-gpu.json"
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = folder / "gpu_results.md"
    page.write_text(drawn(name, today, results), encoding="utf-8")
    return page


def drawn(name: str, today: str, results: list[PartResult]) -> str:
    """The page: how each part ended, then its rows."""
    lines = [f"# Results on {name}", "", f"Written by `make gpu` on {today}, commit {commit() or 'unknown'}.", ""]
    lines += ["| part | state | seconds | |", "|---|---|---|---|"]
    for one in results:
        lines.append(f"| {one.part.title} | {one.state} | {one.seconds:.0f} | {plain(one.problem)} |")
    for one in results:
        if one.rows:
            lines += ["", f"## {one.part.title}", "", "| what | measured | wanted | met |", "|---|---|---|---|"]
            for row in one.rows:
                cells = plain(row.what), plain(row.measured), plain(row.wanted), MET[row.met]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def problem_rows(result: PartResult) -> list[Row]:
    return [Row(result.part.title, result.problem, "", False if result.state is State.failed else None)]


def plain(text: str) -> str:
    """Text for a cell of a table."""
    return text.replace("|", "\\|").replace("\n", " ")


def device_name(device: str) -> str:
    """The GPU's name, or the processor's."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name()
    from parallel.device import processor_name

    return processor_name()


def commit() -> str | None:
    """The tree's commit, with a plus sign where files have changed; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
