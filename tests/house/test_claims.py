"""Each claim's files, tests and commands exist; tables of measurements and the index of decisions are current."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
HEADER = "| § | claim | code | test or command | evidence |"
MEASUREMENTS = sorted((DOCS / "measurements").glob("*.json"))


def claims() -> list[list[str]]:
    """The cells of each row of the tables of claims."""
    rows: list[list[str]] = []
    inside = False
    for line in (DOCS / "claims.md").read_text(encoding="utf-8").splitlines():
        inside = line == HEADER or (inside and line.startswith("|"))
        if inside and line != HEADER and not line.startswith("|---"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def missing(reference: str) -> str | None:
    """What of a path, `path::test`, or command does not exist; None if all of it does."""
    if module := re.search(r"python -m ([\w.]+)", reference):
        found = importlib.util.find_spec(module[1])
        return None if found else f"module {module[1]}"
    words = reference.split()
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        return None if words[1] in targets else f"target {words[1]}"
    if words[0] == "longcat":
        from launch.verbs import VERBS

        return None if words[1] in VERBS else f"verb {words[1]}"
    path, _, test = next((word for word in words if "/" in word), words[0]).partition("::")
    if not (ROOT / path).exists():
        return path
    has_test = not test or f"def {test}(" in (ROOT / path).read_text(encoding="utf-8")
    return None if has_test else f"{path}::{test}"


@pytest.mark.parametrize("row", claims(), ids=lambda row: row[1][:60])
def test_claim_names_existing_code_and_tests(row: list[str]) -> None:
    assert len(row) == 5, "a claim has section, claim, code, test and evidence"
    _, claim, code, shown, evidence = row
    assert evidence, f"{claim}: no evidence; say `not yet` where there is none"
    assert shown or "not yet" in evidence or code, f"{claim}: neither a test nor `not yet`"
    assert not [found for ref in re.findall(r"`([^`]+)`", f"{code} {shown}") if (found := missing(ref))]


@pytest.mark.parametrize("path", MEASUREMENTS, ids=lambda path: path.stem)
def test_measurement_is_complete(path: Path) -> None:
    draw = _draw()
    one = draw.load()[path.stem]
    assert {"name", "date", "machine", "command", "commit", "columns", "rows", "notes"} <= one.keys()
    assert path.name.startswith(one["date"])
    assert all(len(row) == len(one["columns"]) for row in one["rows"])
    assert not (one["command"] and missing(one["command"]))


def test_tables_of_measurements_are_current() -> None:
    done = subprocess.run(
        [sys.executable, str(DOCS / "measurements" / "draw.py"), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"run python docs/measurements/draw.py; stale: {done.stdout}{done.stderr}"


def test_index_of_decisions_lists_each_record() -> None:
    index = (DOCS / "decisions" / "README.md").read_text(encoding="utf-8")
    records = {path.name for path in (DOCS / "decisions").glob("20*.md")}
    assert records == set(re.findall(r"\((20[\w-]+\.md)\)", index))


def _draw() -> Any:
    spec = importlib.util.spec_from_file_location("draw", DOCS / "measurements" / "draw.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
