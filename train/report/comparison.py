"""Several runs side by side, best first: final figures, differences of configuration, overlaid curves."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from longcat.errors import ConfigError
from train.report.axes import Axes
from train.report.chart import Chart, Guide, Page, Series
from train.report.curves import BUCKETS
from train.report.numbers import DASH, Formatter, compact, duration, exact, fixed, percent, plain
from train.report.page import controls, draw, footer, write_page
from train.report.reading import RunData, read_run
from train.report.sweep import Contestant, Differences, letter, sweep_charts

PALETTE, DASHES = 8, 3
NAMED = 24  # runs with a name at the right edge of a chart
ENVELOPES = 3  # runs up to which a chart shows each curve's extremes
FEW = 6  # runs up to which validations are dots
POINTS = 2400  # of all curves of a chart together
TABLE_KEYS = 6  # differing settings that have room in the table of results
ENVIRONMENT = ("git_commit", "git_dirty", "device", "world_size", "python", "driver", "packages.torch")


@dataclass(frozen=True)
class Figure:
    """One column of the table of results. `best` picks the winner, None where there is none."""

    name: str
    read: Callable[[RunData], float]
    write: Formatter
    best: Callable[[list[float]], float] | None = None


FIGURES = (
    Figure("val loss", lambda run: run.last("val_loss"), fixed(3), min),
    Figure("train loss", lambda run: run.final("loss"), fixed(3), min),
    Figure("bits per byte", lambda run: run.last("val_bits_per_byte"), fixed(3), min),
    Figure("FFN experts", lambda run: run.final("ffn_experts_per_token"), fixed(2)),
    Figure("max / mean load", lambda run: run.final("expert_load_max_over_mean"), fixed(2), min),
    Figure("parameters", lambda run: run.number("derived.parameters") or math.nan, compact),
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
    target.parent.mkdir(parents=True, exist_ok=True)
    judged_by, runs = in_order([read_run(Path(run_dir)) for run_dir in run_dirs], target)
    page, differing = Page(Axes([one.run for one in runs])), Differences.of_runs([one.run for one in runs])
    lead = f"<p class=lead>{escape(verdict(runs, judged_by))}</p>"
    body = f"<header><p class=kind>Comparison</p><h1>{len(runs)} runs</h1>{lead}</header>"
    drawn = draw(page, curves(runs))
    parts = (
        ("Results", results(runs, differing)),
        ("Loss against settings", sweep_charts(runs, differing, judged_by)),
        ("What differs", what_differs(runs, differing)),
        ("Curves", controls(page) + drawn if drawn else ""),
    )
    body += "".join(f"<section><h2>{title}</h2>{html}</section>" for title, html in parts if html)
    notes = [f"{one.run.name}: {note}" for one in runs for note in one.run.notes]
    names = ", ".join(one.run.name for one in runs)
    return write_page(target, f"Comparison of {names}", body + footer(notes) + page.script_data(), several=True)


def in_order(runs: list[RunData], target: Path, chosen_by: list[RunData] | None = None) -> tuple[str, list[Contestant]]:
    """Sort by the final validation loss, or by the training loss where a run has no other; without any, last.

    Where ``chosen_by`` is given, those runs decide which of the two it is.
    Runs without metrics come after all others, since the tables of the axes (`Axes`) leave them out.
    """
    measured = [run for run in chosen_by or runs if math.isfinite(run.final("loss"))]
    by_validation = bool(measured) and all(math.isfinite(run.last("val_loss")) for run in measured)
    key, label = ("val_loss", "validation loss") if by_validation else ("loss", "training loss")
    losses = [run.last(key) if by_validation else run.final(key) for run in runs]
    order = sorted(
        range(len(runs)), key=lambda index: (not runs[index].columns, not math.isfinite(losses[index]), losses[index])
    )
    return label, [
        Contestant(number, runs[index], losses[index], _link(runs[index], target)) for number, index in enumerate(order)
    ]


def _link(run: RunData, target: Path) -> str:
    report = run.path / "report.html"
    return quote(os.path.relpath(report, target.parent)) if report.is_file() else ""


def verdict(runs: list[Contestant], judged_by: str) -> str:
    """Say which run ends lowest."""
    if not all(math.isfinite(one.loss) for one in runs):
        return "Not every run has a loss to compare."
    first, second = runs[:2]
    gap = second.loss - first.loss
    return f"Lowest {judged_by}: A {first.run.name} with {first.loss:.3f}, {gap:.3f} below B {second.run.name}."


def results(runs: list[Contestant], differing: Differences) -> str:
    """Return the table of final figures, best run first, with the settings that differ if they are few.

    The best of each column is set bold. What is the same for all is a sentence instead of a column.
    """
    table = {figure: [figure.read(one.run) for one in runs] for figure in FIGURES}
    table = {figure: values for figure, values in table.items() if any(map(math.isfinite, values))}
    same = {figure: values[0] for figure, values in table.items() if len({figure.write(v) for v in values}) == 1}
    varied = {figure: values for figure, values in table.items() if figure not in same}
    keys = differing.settings if len(differing.settings) <= TABLE_KEYS else {}
    rows = []
    for index, one in enumerate(runs):
        figures = [_cell(figure, values, index) for figure, values in varied.items()]
        cells = [*figures[:1], *(f"<td>{escape(values[index])}</td>" for values in keys.values()), *figures[1:]]
        rows.append(f"<tr data-run={index}><td>{name_cell(one)}</td>{''.join(cells)}</tr>")
    names = [figure.name for figure in varied]
    heads = ["run", *names[:1], *keys, *names[1:]]
    said = ", ".join(f"{figure.name} {figure.write(value)}" for figure, value in same.items() if figure.name != "time")
    return scrolled(heads, rows) + (f"<p class=legend>The same for all: {escape(said)}.</p>" if said else "")


def _cell(figure: Figure, values: list[float], index: int) -> str:
    finite = [value for value in values if math.isfinite(value)]
    winner = figure.best is not None and values[index] == figure.best(finite)
    text = figure.write(values[index]) if math.isfinite(values[index]) else DASH
    return f"<td{' class=best' if winner else ''}>{text}</td>"


def name_cell(one: Contestant) -> str:
    """Return a run's letter in its colour and its name, linked to its report."""
    name = escape(one.run.name).replace("_", "_<wbr>")
    linked = f'<a href="{escape(one.link)}">{name}</a>' if one.link else name
    return f'<span class="tag c{one.number % PALETTE}">{letter(one.number)}</span>{linked}'


def scrolled(heads: list[str], rows: list[str]) -> str:
    """Return a table that scrolls sideways under its first column where it is wider than the page."""
    cells = "".join(f"<th>{escape(head).replace('.', '.<wbr>').replace('_', '_<wbr>')}</th>" for head in heads)
    return f"<div class=scrolled><table><thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"


def what_differs(runs: list[Contestant], differing: Differences) -> str:
    """Return the settings that differ, unless the table of results has them, and what differs around the runs."""
    text = ""
    if not differing.settings:
        text = "<p>The configurations are the same.</p>" if any(one.run.config for one in runs) else ""
    tables = [differing.settings] if len(differing.settings) > TABLE_KEYS else []
    if around := Differences.of([environment(one.run) for one in runs]):
        tables.append(around)
    for columns in tables:
        rows = [
            f"<tr data-run={index}><td>{name_cell(one)}</td>"
            + "".join(f"<td>{escape(values[index])}</td>" for values in columns.values())
            + "</tr>"
            for index, one in enumerate(runs)
        ]
        text += scrolled(["run", *columns], rows)
    return text


def environment(run: RunData) -> dict[str, Any]:
    """What a run ran on, as far as it can change results or speed."""
    found = {key: run.setting(f"environment.{key}") for key in ENVIRONMENT}
    return {key: str(value)[:10] if key == "git_commit" else value for key, value in found.items() if value is not None}


def curves(runs: list[Contestant]) -> list[Chart | None]:
    """Return the overlaid charts; None where no run has data."""
    wanted = {one.run.number("model.expected_ffn_experts") for one in runs} - {None}
    guides = [Guide(value, f"Kₑ = {exact(value)}") for value in sorted(value for value in wanted if value is not None)]
    return [
        _overlay(runs, "loss", fixed(3), "Training loss", "nats per token", log=True, wide=True, range_from=0.1),
        _overlay(runs, "val_loss", fixed(3), "Validation loss", "nats per token", log=True, range_from=0.1),
        _overlay(runs, "ffn_experts_per_token", fixed(2), "FFN experts per token", "", guides=guides),
        _overlay(runs, "grad_norm", plain, "Gradient norm", "", log=True, range_from=0.1),
        _overlay(runs, "tokens_per_second", plain, "Throughput", "tokens per second", from_zero=True),
    ]


def _overlay(runs: list[Contestant], key: str, write: Formatter, title: str, unit: str, **options: Any) -> Chart | None:
    """Draw one metric of all runs; each curve ends with its run's letter."""
    series, ends = [], []
    for one in runs:
        steps, y = one.run.points(key)
        if len(steps) < 2:
            continue
        final = one.run.final(key)
        end, number = f"{letter(one.number)} {write(final)}", one.number
        looks = {
            "points": key == "val_loss" and len(runs) <= FEW,
            "dashes": number // PALETTE % DASHES,
            "named": number < NAMED,
        }
        series.append(
            Series(letter(number), steps, y, number % PALETTE, end=end, value=final, run=number, **looks)  # type: ignore[arg-type]
        )
        ends.append((final, end))
    if not series:
        return None
    low, high = min(ends)[1], max(ends)[1]
    text = ", ".join(end for _, end in ends) if len(ends) <= 4 else f"between {low} and {high}"
    ends_at = f"ends at {text}" if len(ends) <= 4 else f"ends {text}"
    sentence = f"{unit[:1].upper()}{unit[1:]}, {ends_at}." if unit else f"{ends_at[:1].upper() + ends_at[1:]}."
    if options.get("range_from"):
        sentence += " The first tenth may leave the frame."
    few = len(series) <= ENVELOPES
    buckets = min(BUCKETS, max(80, POINTS // len(series)))
    return Chart(title, sentence, series, envelopes=few, buckets=buckets, **options)


def _median(run: RunData, key: str) -> float:
    values = run.series(key)[1]
    return float(np.median(values)) if len(values) else math.nan
