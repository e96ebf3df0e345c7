"""Several runs side by side: final figures, differences of configuration, overlaid curves."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from longcat.errors import ConfigError
from train.checkpoint.compatibility import flatten
from train.report.chart import Chart, Guide, Series, render
from train.report.numbers import DASH, Formatter, compact, duration, exact, fixed, percent, plain
from train.report.page import footer, grid, show, write_page
from train.report.reading import RunData, read_run

PALETTE = 8


@dataclass(frozen=True)
class Figure:
    """One column of the table of results. `best` picks the winner, None where there is none."""

    name: str
    read: Callable[[RunData], float]
    write: Formatter
    best: Callable[[list[float]], float] | None = None


FIGURES = (
    Figure("train loss", lambda run: run.final("loss"), fixed(3), min),
    Figure("val loss", lambda run: run.last("val_loss"), fixed(3), min),
    Figure("bits per byte", lambda run: run.last("val_bits_per_byte"), fixed(3), min),
    Figure("FFN experts", lambda run: run.final("ffn_experts_per_token"), fixed(2)),
    Figure("max / mean load", lambda run: run.final("expert_load_max_over_mean"), fixed(2), min),
    Figure("tokens", lambda run: run.last("tokens"), compact),
    Figure("tokens/s", lambda run: _median(run, "tokens_per_second"), plain, max),
    Figure("MFU", lambda run: _median(run, "mfu"), percent, max),
    Figure("time", lambda run: run.total_seconds, duration),
)


def write_comparison(run_dirs: list[Path], target: Path) -> Path:
    """Write a page that compares the runs and return its path.

    Raises ConfigError with fewer than two runs, where a folder is no run, or where `target` is a folder.
    """
    if len(run_dirs) < 2:
        raise ConfigError(f"a comparison needs at least two runs, got {len(run_dirs)}; name more run folders")
    target = Path(target)
    if target.is_dir():
        raise ConfigError(f"{target} is a folder; give the name of the .html file to write")
    runs = [read_run(Path(run_dir)) for run_dir in run_dirs]
    target.parent.mkdir(parents=True, exist_ok=True)
    names = ", ".join(run.name for run in runs)
    lead = f"<p class=lead>{escape(verdict(runs))}</p>"
    body = f"<header><p class=kind>Comparison</p><h1>{len(runs)} runs</h1>{lead}</header>"
    parts = (("Results", results(runs)), ("What differs", differences(runs)), ("Curves", grid(curves(runs))))
    body += "".join(f"<section><h2>{title}</h2>{html}</section>" for title, html in parts if html)
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    return write_page(target, f"Comparison of {names}", body + footer(notes))


def verdict(runs: list[RunData]) -> str:
    """Say which run ends lowest, by validation loss where all have it."""
    for key, label, read in (
        ("val_loss", "validation loss", RunData.last),
        ("loss", "training loss", RunData.final),
    ):
        values = [read(run, key) for run in runs]
        if all(math.isfinite(value) for value in values):
            order = np.argsort(values, kind="stable")
            first, second = runs[order[0]], runs[order[1]]
            gap = values[order[1]] - values[order[0]]
            return (
                f"Lowest {label}: {letter(order[0])} {first.name} with {values[order[0]]:.3f}, "
                f"{gap:.3f} below {letter(order[1])} {second.name}."
            )
    return "Not every run has a loss to compare."


def letter(index: int) -> str:
    """Return A, B, … Z, AA: the short name of a run on this page."""
    return (letter(index // 26 - 1) if index >= 26 else "") + chr(ord("A") + index % 26)


def _tag(index: int) -> str:
    return f'<span class="tag c{index % PALETTE}">{letter(index)}</span>'


def results(runs: list[RunData]) -> str:
    """Return the table of final figures, one row per run; the best of each column is set bold."""
    table = {figure: [figure.read(run) for run in runs] for figure in FIGURES}
    table = {figure: values for figure, values in table.items() if any(map(math.isfinite, values))}
    rows = []
    for index, run in enumerate(runs):
        cells = f"<td><span>{_tag(index)}{escape(run.name)}</span></td>"
        for figure, values in table.items():
            finite = [value for value in values if math.isfinite(value)]
            winner = figure.best is not None and values[index] == figure.best(finite)
            cells += (
                f'<td data-label="{escape(figure.name)}"{" class=best" if winner else ""}>'
                f"{figure.write(values[index]) if math.isfinite(values[index]) else DASH}</td>"
            )
        rows.append(f"<tr>{cells}</tr>")
    heads = "".join(f"<th>{escape(figure.name)}</th>" for figure in table)
    return f"<table><thead><tr><th>run</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def differences(runs: list[RunData]) -> str:
    """Return the table of settings that differ between runs, without names and folders."""
    flat = [flatten({k: v for k, v in run.config.items() if k != "run"}) for run in runs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    rows = []
    for key in keys:
        values = [show(one[key]) if key in one else DASH for one in flat]
        if len(set(values)) == 1:
            continue
        cells = "".join(
            f'<td data-label="{letter(index)} {escape(runs[index].name)}">{escape(value)}</td>'
            for index, value in enumerate(values)
        )
        rows.append(f"<tr><td>{escape(key)}</td>{cells}</tr>")
    if not rows:
        return "<p>The configurations are the same.</p>" if any(flat) else ""
    heads = "".join(f"<th>{_tag(index)}{escape(run.name)}</th>" for index, run in enumerate(runs))
    return f"<table><thead><tr><th>setting</th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def curves(runs: list[RunData]) -> list[str]:
    """Return the overlaid charts; empty strings where no run has data."""
    axis = "tokens" if all(run.axis_name == "tokens" for run in runs) else "step"
    wanted = {run.number("model.expected_ffn_experts") for run in runs} - {None}
    guides = [Guide(value, f"Kₑ = {exact(value)}") for value in sorted(value for value in wanted if value is not None)]
    return [
        _overlay(runs, axis, "loss", fixed(3), "Training loss", "nats per token, ends at", log=True, wide=True),
        _overlay(runs, axis, "val_loss", fixed(3), "Validation loss", "nats per token, ends at", log=True),
        _overlay(runs, axis, "ffn_experts_per_token", fixed(2), "FFN experts per token", "ends at", guides=guides),
        _overlay(runs, axis, "grad_norm", plain, "Gradient norm", "ends at", log=True),
        _overlay(runs, axis, "tokens_per_second", plain, "Throughput", "tokens per second, ends at", from_zero=True),
    ]


def _overlay(runs: list[RunData], axis: str, key: str, write: Formatter, title: str, says: str, **options: Any) -> str:
    """Draw one metric of all runs; each curve ends with its run's letter."""
    series, ends = [], []
    for index, run in enumerate(runs):
        x, y = run.series(key)
        if axis == "step" and len(x):
            x = run.columns["step"][np.isfinite(run.axis) & np.isfinite(run.columns[key])]
        if len(x) < 2:
            continue
        end = f"{letter(index)} {write(run.final(key))}"
        dots, later_round = key == "val_loss", index >= PALETTE
        series.append(Series(letter(index), x, y, index % PALETTE, dots, dashed=later_round, end=end))
        ends.append(end)
    sentence = f"{says[:1].upper()}{says[1:]} {', '.join(ends)}."
    return render(Chart(title, sentence, series, axis_name=axis, **options)) if series else ""


def _median(run: RunData, key: str) -> float:
    values = run.series(key)[1]
    return float(np.median(values)) if len(values) else math.nan
