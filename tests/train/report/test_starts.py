"""The report shows where the wall time of a run with restarts went, and how each start ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launch.supervisor import ledger
from train.report.page import write_report
from train.report.reading import read_run
from train.report.starts import PARTS, availability, starts_section, totals

END = {"event": "end", "incarnation": 1, "time": 1.8e9, "cause": "out_of_memory", "code": 1, "ranks": [3], "step": 40}
TOTALS = {"event": "totals", "wall_seconds": 100.0, "faults": 1, **dict.fromkeys(PARTS, 0.0)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": n, "loss": 3.0}) + "\n" for n in (1, 2)))
    return tmp_path


def write(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "launch.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_parts_are_the_ledger_s() -> None:
    assert set(PARTS) == set(ledger.PARTS)


def test_run_without_restarts_has_no_section(folder: Path) -> None:
    assert starts_section(read_run(folder)) == ""
    assert "availability" not in write_report(folder).read_text()


def test_totals_of_all_commands_are_added(folder: Path) -> None:
    write(
        folder, END, {**TOTALS, "useful": 60, "lost": 40}, END, {**TOTALS, "useful": 80, "saving": 10, "starting": 10}
    )
    found = totals(read_run(folder).starts)
    assert found["wall_seconds"] == 200 and found["faults"] == 2
    assert availability(found) == 0.75
    page = write_report(folder).read_text()
    assert "2 faults ended the ranks; availability 75" in page
    assert "lost 40" in page and "saving 10" in page and "waiting" not in page.split("class=shares")[1].split("</p>")[0]


def test_each_end_has_a_row(folder: Path) -> None:
    write(folder, {**END, "first_step_seconds": 7.5}, {**END, "cause": "hang", "ranks": []})
    html = starts_section(read_run(folder))
    assert html.count("<tr>") == 3 and "<td>out of memory</td><td>3</td><td>40</td><td>1</td>" in html
    assert "2027-01-15" in html and "class=shares" not in html, "no command has ended yet"


@pytest.mark.parametrize("wrong", [{"time": 1e99}, {"time": None}, {"time": "x"}, {"ranks": 7}, {"code": "<b>"}])
def test_odd_lines_are_shown_without_harm(folder: Path, wrong: dict[str, Any]) -> None:
    write(folder, {**END, **wrong}, {**TOTALS, "useful": "much", "wall_seconds": None})
    html = starts_section(read_run(folder))
    assert "<tr>" in html and "<b>" not in html
