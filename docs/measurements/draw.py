"""Draws the tables of measurements in README.md and docs/ from the JSON files of this folder.

    python docs/measurements/draw.py          rewrites every table that is not current
    python docs/measurements/draw.py --check  only names the pages with stale tables; exit code 1 if there are any

A page asks for a table by a pair of comments: `<!-- table: NAME -->` and `<!-- end of table -->`. NAME is a file's stem
(`2026-11-25-bubble`), the `table` entry that several files share (`throughput`; newest date first), or `targets` for
the targets of all files. A file has: name, date, machine, command, commit (null if unknown), columns, rows, notes and,
where a target was set beforehand, targets.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MARKED = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def load() -> dict[str, dict[str, Any]]:
    """Stem → measurement, newest date first."""
    paths = sorted(HERE.glob("*.json"), key=lambda path: (path.stem[:10], path.stem), reverse=True)
    # parse_float=str keeps a figure as it was written down: 4.40 stays 4.40
    return {path.stem: json.loads(path.read_text(encoding="utf-8"), parse_float=str) for path in paths}


def cell(value: Any) -> str:
    """A figure as markdown; null is an empty cell."""
    if value is None:
        return ""
    return {True: "yes", False: "**no**"}[value] if isinstance(value, bool) else str(value)


def markdown(columns: list[str], rows: list[list[Any]]) -> list[str]:
    """Table lines, without the columns in which every cell is empty."""
    used = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    lines = [[columns[i] for i in used], ["---"] * len(used), *([cell(row[i]) for i in used] for row in rows)]
    return [f"| {' | '.join(line)} |" for line in lines]


def draw(name: str, page: Path) -> str:
    """The table called `name` for this page, with a source line for each file that it uses."""
    measured = load()
    if name == "targets":
        rows = [
            [target["what"], target["target"], target["measured"], target["met"], one["date"]]
            for one in measured.values()
            for target in one.get("targets", [])
        ]
        return "\n".join(markdown(["what", "target", "measured", "met", "date"], rows)) + "\n"
    files = {stem: one for stem, one in measured.items() if name in (stem, one.get("table"))}
    if not files:
        raise SystemExit(f"{page}: no file of docs/measurements is called {name} or has it as its table")
    columns = next(iter(files.values()))["columns"]
    rows = [[one["date"], *row] for one in files.values() for row in one["rows"]]
    if any(one["columns"] != columns for one in files.values()):
        raise SystemExit(f"the files of table {name} differ in their columns")
    one_file = len(files) == 1
    lines = markdown(columns, [row[1:] for row in rows]) if one_file else markdown(["date", *columns], rows)
    sources = []
    for stem, one in files.items():
        link = Path(os.path.relpath(HERE / f"{stem}.json", page.parent)).as_posix()
        how = f"`{one['command']}`; " if one["command"] else ""
        sources.append(f"- [{one['date']}]({link}): {how}{one['machine']}.")
    return "\n".join([*lines, "", *sources]) + "\n"


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def drawn(page: Path) -> str:
    """The page's text with all its tables current."""
    text = page.read_text(encoding="utf-8")
    return MARKED.sub(lambda found: found[1] + "\n" + draw(found["name"], page) + "\n" + found[3], text)


def main() -> int:
    stale = [page for page in pages() if page.read_text(encoding="utf-8") != drawn(page)]
    for page in stale:
        print(page.relative_to(ROOT))
        if "--check" not in sys.argv:
            page.write_text(drawn(page), encoding="utf-8")
    return int("--check" in sys.argv and bool(stale))


if __name__ == "__main__":
    raise SystemExit(main())
