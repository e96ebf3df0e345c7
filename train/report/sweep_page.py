"""A sweep's report.html: one table and one picture of its runs, also of those that failed or have not ended."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from html import escape
from pathlib import Path

from longcat.errors import ConfigError
from train.report.comparison import in_order, scrolled
from train.report.numbers import DASH, fixed
from train.report.page import footer, write_page
from train.report.reading import RunData, read_run
from train.report.sweep import SEED, Contestant, Differences, letter, short, sweep_chart
from train.sweeps.results import Result, results

REPORT = "report.html"


@dataclass(frozen=True)
class SweepRow:
    """A row of the table. `state` is empty for a run that reached its last step."""

    one: Contestant
    result: Result
    state: str


def write_sweep_report(folder: Path) -> Path:
    """Write `<folder>/report.html` of a sweep's folder and return its path.

    Runs that reached their last step come first, the lowest loss at the top; then those that have not, with the loss
    so far; then those that failed, with their message. Raises ConfigError where the folder has no run's result.
    """
    found = results(folder)
    if not found:
        raise ConfigError(f"{folder} has no run yet; give the folder of a sweep that has begun")
    target = folder / REPORT
    runs = [_read(result, folder) for result in found]
    judged_by, entries = _ranked(found, runs, target)
    done = [entry for entry in entries if not entry.state]
    drawn, colours = sweep_chart([entry.one for entry in done], _differences(done), judged_by)
    lead = f"{_counts(entries)} {_verdict(done, judged_by)}".strip()
    body = (
        f"<header><p class=kind>Sweep</p><h1>{escape(folder.resolve().name)}</h1>"
        f"<p class=lead>{escape(lead)}</p></header><section><h2>Loss</h2>{drawn}</section>"
        f"<section><h2>Runs</h2>{_table(entries, judged_by, colours)}{_messages(entries)}</section>"
    )
    notes = [f"{entry.one.run.name}: {note}" for entry in entries for note in entry.one.run.notes]
    return write_page(target, folder.resolve().name, body + footer(notes), several=True)


def _read(result: Result, sweep: Path) -> RunData:
    """The run's data; none of a run that ended before it had a folder."""
    folder = result.folder(sweep)
    try:
        return read_run(folder)
    except ConfigError:
        return RunData(folder, {}, {})


def _ranked(found: list[Result], runs: list[RunData], target: Path) -> tuple[str, list[SweepRow]]:
    """What the runs are judged by, and the rows of the table in their order."""
    states = {id(run): (_state(result, run), result) for result, run in zip(found, runs, strict=True)}
    groups: tuple[list[RunData], ...] = ([], [], [])
    for run in runs:
        state, result = states[id(run)]
        groups[2 if result.failed else 1 if state else 0].append(run)
    judged_by, entries = "", list[SweepRow]()
    for group in filter(None, groups):
        judged_by, ordered = in_order(group, target, chosen_by=groups[0] or runs)
        for one in ordered:
            state, result = states[id(one.run)]
            entries.append(SweepRow(Contestant(len(entries), one.run, one.loss, one.link), result, state))
    return judged_by, entries


def _state(result: Result, run: RunData) -> str:
    """What keeps a run out of the ranking: it failed, or has not reached its last step. Empty otherwise."""
    if result.reached_end:
        return ""
    if result.failed and not run.columns:
        return "failed"
    wanted, last = run.number("train.steps"), int(run.last("step")) if run.columns else 0
    text = f"step {last:,}" + (f" of {wanted:,.0f}" if wanted else "")
    return f"{'failed, ' * result.failed}{'stopped early, ' * result.stopped_early}{text}"


def _differences(entries: list[SweepRow]) -> Differences:
    return Differences([entry.result.settings() for entry in entries])


def _columns(entries: list[SweepRow]) -> dict[str, list[str]]:
    """{key: its value in each row} of the settings that differ; a dash where a result could not be read."""
    known = [index for index, entry in enumerate(entries) if entry.result.overrides]
    columns = {}
    for key, values in _differences([entries[index] for index in known]).settings.items():
        by_row = dict(zip(known, values, strict=True))
        columns[key] = [by_row.get(index, DASH) for index in range(len(entries))]
    return columns


def _counts(entries: list[SweepRow]) -> str:
    """How many runs there are, and how many did not reach their last step."""
    failed = sum(entry.result.failed for entry in entries)
    early = sum(entry.result.stopped_early for entry in entries)
    open_ = sum(entry.result.code is None for entry in entries)
    parts = [f"{len(entries)} run{'s' * (len(entries) > 1)}"]
    parts += [f"{failed} failed"] if failed else []
    parts += [f"{early} stopped early"] if early else []
    parts += [f"{open_} not ended"] if open_ else []
    return f"{', '.join(parts)}."


def _verdict(done: list[SweepRow], judged_by: str) -> str:
    """Say which settings end lowest, by the mean over seeds where several were run."""
    means: dict[tuple[tuple[str, str], ...], list[float]] = defaultdict(list)
    differing = _differences(done).settings
    for index, entry in enumerate(done):
        if math.isfinite(entry.one.loss):
            means[tuple((key, values[index]) for key, values in differing.items() if key != SEED)].append(
                entry.one.loss
            )
    if not means:
        return "No run has a final loss yet."
    best = min(means, key=lambda settings: sum(means[settings]) / len(means[settings]))
    losses = means[best]
    at = f" at {', '.join(f'{key}={short(value)}' for key, value in best)}" if best else ""
    mean = f"mean {judged_by} of {len(losses)} seeds" if len(losses) > 1 else judged_by
    return f"Lowest {mean}: {sum(losses) / len(losses):.3f}{at}."


def _table(entries: list[SweepRow], judged_by: str, colours: dict[int, int]) -> str:
    """One row for each run: its loss, the settings that differ, and what kept it from its last step.

    A run's letter has the colour of its point in the picture; that of a run without a point has none.
    """
    settings = _columns(entries)
    has_states = any(entry.state for entry in entries)
    losses = [entry.one.loss for entry in entries if not entry.state and math.isfinite(entry.one.loss)]
    rows = []
    for index, entry in enumerate(entries):
        one, loss = entry.one, entry.one.loss
        text = fixed(3)(loss) if math.isfinite(loss) else DASH
        best = " class=best" if losses and not entry.state and loss == min(losses) else ""
        name = escape(one.run.name).replace("_", "_<wbr>")
        name = f'<a href="{escape(one.link)}">{name}</a>' if one.link else name
        colour = f" c{colours[index]}" if index in colours else ""
        cells = [f'<td><span class="tag{colour}">{letter(one.number)}</span>{name}</td>']
        cells += [f"<td{best}>{text}</td>", *(_setting(values[index]) for values in settings.values())]
        cells += [f"<td>{escape(entry.state)}</td>"] if has_states else []
        rows.append(f"<tr data-run={index}>{''.join(cells)}</tr>")
    return scrolled(["run", judged_by, *settings, *(["state"] if has_states else [])], rows)


def _setting(text: str) -> str:
    """A cell; the pointer shows all digits of a number that is shortened."""
    title = "" if short(text) == text else f' title="{escape(text)}"'
    return f"<td{title}>{escape(short(text))}</td>"


def _messages(entries: list[SweepRow]) -> str:
    """Why runs failed, one paragraph each."""
    return "".join(
        f"<p class=legend><b>{escape(entry.one.run.name)}</b> (exit code {entry.result.code}): "
        f"{escape(entry.result.message or 'no message')}</p>"
        for entry in entries
        if entry.result.failed
    )
