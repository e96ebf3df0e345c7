"""The table of layouts and their largest errors: printed after the suite, and written where --parity-table says."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest

ERRORS: dict[str, tuple[int, str, dict[str, float]]] = {}  # layout → ranks, its overrides, largest error of each kind
SHOWN = ("first gradients", "last gradients", "grad_norm", "weights", "exp avg", "exp avg_sq", "biases", "loss")
COLUMNS = ("gradients, step 1", "gradients, step 3", "norm", "weights", "first moment", "second", "biases", "loss")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-table", metavar="FILE", help="write the table of layouts and errors there, as markdown")


def table() -> list[str]:
    """Markdown lines."""
    lines = [f"| layout | ranks | {' | '.join(COLUMNS)} |", f"|---|---|{'---|' * len(COLUMNS)}"]
    for name, (ranks, _, errors) in ERRORS.items():
        lines.append(f"| {name} | {ranks} | {' | '.join(f'{errors[key]:.1e}' for key in SHOWN)} |")
    return lines


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not ERRORS:
        return
    terminalreporter.section("largest relative errors against one process, float32")
    for line in table():
        terminalreporter.write_line(line)
    if target := config.getoption("--parity-table", default=None):
        made = f"{len(ERRORS)} layouts, {date.today().isoformat()}, by `make parity`."
        words = [f"| {name} | `{overrides}` |" for name, (_, overrides, _) in ERRORS.items()]
        Path(target).write_text("\n".join([HEAD, made, "", *table(), "", LAYOUTS, *words, ""]))


HEAD = """# Every layout against one process

What each layout computed in three training steps of a small model in float32, as the largest ‖Δ‖/‖ref‖ over the
tensors of a kind against one process; norm and loss as relative differences, largest over the steps. Selections of
experts and counts are identical, initial weights equal to the bit, and the state's hash is the same on all ranks: the
suite asserts it. Bounds: 2e-6 for the gradients of step 1, 1e-5 for the rest. Other summation orders alone give about
1e-6. An error of 0.0 means equal to the bit.
"""
LAYOUTS = """## What the names stand for

| layout | overrides |
|---|---|"""
