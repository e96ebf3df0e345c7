"""The table of layouts and their largest errors: printed after the tests, and written to --parity-table."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import Any

import pytest

ERRORS: dict[str, tuple[int, str, dict[str, float]]] = {}  # layout → ranks, overrides, largest error of each kind
SHOWN = ("first gradients", "last gradients", "grad_norm", "weights", "exp avg", "exp avg_sq", "biases", "loss")
COLUMNS = (
    "gradients, step 1", "gradients, step 3", "norm", "weights", "first moment", "second moment", "biases", "loss",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-table", metavar="FILE", help="write the table of layouts and errors there, as markdown")


def table() -> list[str]:
    """The table as lines of markdown."""
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
        made = f"{len(ERRORS)} layouts, {date.today().isoformat()}, made by `make parity`."
        words = [f"| {name} | `{overrides}` |" for name, (_, overrides, _) in ERRORS.items()]
        Path(target).write_text("\n".join([HEAD, made, "", *table(), "", LAYOUTS, *words, ""]))


HEAD = """# Tested layouts against one process

Errors of each parallel layout after three training steps of a small model in float32, on gloo CPU ranks, not on GPUs.

- Columns of tensors: the largest ‖difference‖/‖reference‖ of any tensor of that kind. Norm (of the gradients) and loss:
  the largest relative difference.
- Bounds: 2e-6 for the gradients of step 1, 1e-5 for the rest. Another order of summation alone gives about 1e-6.
- 0.0 means bitwise equal.
- The suite also asserts that selections and counts are identical, that initial weights are bitwise equal and that all
  ranks have the same state hash.
"""
LAYOUTS = """## Overrides of each layout

| layout | overrides |
|---|---|"""
