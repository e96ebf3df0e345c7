"""The report of one run: header, headline figures, charts by subject, text, configuration, environment."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from train.checkpoint.files import write_whole
from train.keys.dotted import flatten
from train.report import health, learning, routing
from train.report.axes import Axes
from train.report.chart import Chart, Page
from train.report.condition import condition
from train.report.marks import marks_legend, marks_of
from train.report.numbers import DASH, compact, duration, exact, percent, plain, signed_percent
from train.report.page_script import SCRIPT
from train.report.reading import RunData, is_number, read_run
from train.report.starts import starts_section
from train.report.text_page import text_section
from train.report.theme import style_sheet
from train.report.timeline import timeline_section


def write_report(run_dir: Path) -> Path:
    """Write `<run_dir>/report.html` from the files of the run folder and return its path.

    The page is one file without any external resource. What the run has not measured is left out. Raises
    ConfigError where the folder is no run or its config.yaml cannot be read.
    """
    run = read_run(Path(run_dir))
    axes = Axes([run], marks_of(run))
    page = Page(axes)
    sections = [
        ("learning", "Learning", marks_legend(axes) + draw(page, learning.charts(run))),
        ("routing", "Routing", draw(page, routing.charts(run)) + "".join(routing.blocks(run, axes))),
        ("stability", "Stability", draw(page, health.stability(run))),
        ("speed", "Speed and memory", draw(page, health.speed(run))),
        ("starts", "Starts and wall time", starts_section(run)),
        ("timeline", "Timeline", timeline_section(run)),
        ("text", "Compute by token", text_section(run)),
        ("settings", "Settings", settings(run)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = header(run) + f"<nav>{links}</nav>" + controls(page)
    body += "".join(f'<section id="{key}"><h2>{title}</h2>{html}</section>' for key, title, html in sections)
    return write_page(run.path / "report.html", run.name, body + footer(run.notes) + page.script_data())


def write_page(target: Path, title: str, body: str, several: bool = False) -> Path:
    """Write the page around `body` and rename it when complete, so that no reader sees half a file.

    On a page of `several` runs a run stands out in all charts while the pointer is on its name.

    Raises:
        ConfigError: the page cannot be written.
    """
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style_sheet()}</style></head>\n"
        f"<body{' class=several' if several else ''}><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )
    write_whole(target, page.encode(errors="replace").decode())
    return target


def draw(page: Page, charts: Sequence[Chart | None]) -> str:
    """Draw charts in two columns; the last of an odd number between wide ones takes the full width."""
    shown = [(chart, html) for chart in charts if chart is not None and (html := page.render(chart))]
    wide = [chart.wide for chart, _ in shown]
    start = 0
    for end in [index for index, is_wide in enumerate(wide) if is_wide] + [len(wide)]:
        if (end - start) % 2:
            wide[end - 1] = True
        start = end + 1
    figures = (
        html if chart.wide == is_wide else html.replace('class="chart"', 'class="chart wide"', 1)
        for (chart, html), is_wide in zip(shown, wide, strict=True)
    )
    return f"<div class=grid>{''.join(figures)}</div>" if shown else ""


def controls(page: Page) -> str:
    """Return the bar that changes the horizontal axis and the smoothing of all charts; hidden without a script."""
    if not page.charts:
        return ""
    axes = page.axes
    buttons = "".join(
        f"<button type=button data-axis={axis.key} aria-pressed={'true' if axis is axes.default else 'false'}>"
        f"{escape(axis.title)}</button>"
        for axis in axes.all
    )
    return (
        f'<div class=controls hidden><span class=choice role=group aria-label="horizontal axis">{buttons}</span>'
        f"<label>smoothing <input type=range min=0 max=4 value=1 step=1></label></div>"
    )


def header(run: RunData) -> str:
    """Return the name, one sentence on the run, its health, the model, the device and the headline figures."""
    lines = (model_line(run), device_line(run), software_line(run))
    facts = "".join(f"<p>{escape(line)}</p>" for line in lines if line) + command_line(run)
    figures = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in headline(run)
        if value != DASH
    )
    block = f"<dl class=figures>{figures}</dl>" if figures else ""
    return (
        f"<header><p class=kind>Pre-training run</p><h1>{escape(run.name)}</h1>"
        f"<p class=lead>{escape(summary(run))}</p>{condition(run)}{facts}{block}</header>"
    )


def summary(run: RunData) -> str:
    """Say in one or two sentences how far the run got and in how much time."""
    if not run.columns:
        return "No step is recorded yet."
    steps, last = len(run.columns["step"]), int(run.columns["step"][-1])
    wanted = run.number("train.steps")
    text = f"{last:,} of {wanted:,.0f} steps" if wanted and wanted > last else f"{last:,} steps"
    text = "1 step" if text == "1 steps" else text
    if run.axis_name == "tokens":
        text += f", {compact(run.last('tokens'))} tokens"
    if math.isfinite(run.total_seconds):
        text += f", {duration(run.total_seconds)} of training"
    losses = run.series("loss")[1]
    if len(losses) > 1:
        text += f". Loss {losses[0]:.2f} → {run.final('loss'):.2f}"
    broken = steps - len(losses)
    if "loss" in run.columns and broken:
        text += f"; {broken} {'step has' if broken == 1 else 'steps have'} no finite loss"
    return text + "."


def model_line(run: RunData) -> str:
    """Describe the model: its name, shape and parameters."""
    shape = []
    for key, form in (
        ("model.num_layers", "{} ScMoE layers"),
        ("model.hidden_size", "width {}"),
        ("model.num_experts", "{} FFN experts"),
        ("model.num_zero_experts", "{} identity experts"),
        ("model.top_k", "top {}"),
    ):
        if (value := run.number(key)) is not None:
            shape.append(form.format(f"{value:g}"))
    parts = [", ".join(shape)] if shape else []
    total, active = run.number("derived.parameters"), run.setting("derived.active_parameters")
    if total:
        parts.append(f"{compact(total)} parameters")
    if isinstance(active, list) and len(active) == 3 and all(is_number(value) for value in active):
        low, middle, high = (compact(float(value)) for value in active)
        parts.append(f"{middle} of them active per token on average ({low} to {high})")
    name = run.setting("model.name")
    text = "; ".join(parts)
    return f"Model {name}: {text}." if name and text else (f"{text}." if text else "")


def device_line(run: RunData) -> str:
    """Describe the device, the ranks and the dates."""
    device, ranks = run.setting("environment.device"), run.number("environment.world_size")
    parts = [f"{device}" + (f", {ranks:.0f} {'rank' if ranks == 1 else 'ranks'}" if ranks else "")] if device else []
    if started := _moment(run.setting("environment.started")):
        parts.append(f"started {started:%-d %B %Y, %H:%M} UTC")
    if run.last_written:
        parts.append(f"last step written {run.last_written:%-d %B %Y, %H:%M} UTC")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _moment(text: Any) -> datetime | None:
    try:
        return datetime.fromisoformat(str(text)) if text else None
    except ValueError:
        return None


def software_line(run: RunData) -> str:
    """Name what ran: Python, torch, the driver, the commit and whether files differed from it."""
    names = (("Python", "python"), ("torch", "packages.torch"), ("CUDA", "cuda"), ("NVIDIA driver", "driver"))
    values = [(name, run.setting(f"environment.{key}")) for name, key in names]
    parts = [f"{name} {value}" for name, value in values if value]
    commit = run.setting("environment.git_commit")
    if commit and commit != "unknown":
        dirty = run.setting("environment.git_dirty")
        parts.append(f"commit {str(commit)[:10]}" + (" with uncommitted changes" if dirty is True else ""))
    return f"{', '.join(parts)}." if parts else ""


def command_line(run: RunData) -> str:
    """Return the command that started the run, empty where it is not recorded."""
    command = run.setting("environment.command")
    return f"<p class=command><code>{escape(str(command))}</code></p>" if command else ""


def headline(run: RunData) -> list[tuple[str, str, str]]:
    """Return (name, value, note) of the headline figures; a dash means not measured."""
    from train.report.reading import tail_length

    count = len(run.series("loss")[1])
    mean = f"mean of the last {tail_length(count)} steps" if tail_length(count) > 1 else "last step"
    experts, wanted = run.final("ffn_experts_per_token"), run.number("model.expected_ffn_experts")
    against = f"Kₑ = {exact(wanted)}, {signed_percent(experts / wanted - 1)}" if wanted else "mean over layers"
    speed, mfu = run.series("tokens_per_second")[1], run.series("mfu")[1]
    waits = run.series("exposed_comm_share")[1]
    return [
        ("Training loss", plain(run.final("loss")), mean),
        ("Validation loss", plain(run.last("val_loss")), "nats per token"),
        ("Bits per byte", plain(run.last("val_bits_per_byte")), "on validation text"),
        ("FFN experts per token", plain(experts), against),
        ("Tokens", compact(run.last("tokens")), _tokens_note(run)),
        ("Tokens per second", compact(_median(speed)), "median, all ranks"),
        ("MFU", percent(_median(mfu)), "median"),
        ("Exposed communication", percent(_median(waits[waits > 0])), "median share of a step"),
        (
            "Peak memory",
            f"{plain(_largest(run, 'memory_gib'))} GiB".replace(f"{DASH} GiB", DASH),
            "of the largest rank",
        ),
    ]


def _tokens_note(run: RunData) -> str:
    sequences, length = run.number("train.global_batch_size"), run.number("train.sequence_length")
    note = f"{compact(sequences * length)} per step" if sequences and length else "seen in training"
    padding = run.series("padding_share")[1]
    return f"{note}, {percent(float(padding.mean()))} of them padding" if len(padding) else note


def _median(values: Any) -> float:
    import numpy as np

    return float(np.median(values)) if len(values) else math.nan


def _largest(run: RunData, key: str) -> float:
    values = run.series(key)[1]
    return float(values.max()) if len(values) else math.nan


def settings(run: RunData) -> str:
    """Return configuration, derived values and environment, each in a closed <details>."""
    special = {"environment": "Environment", "derived": "Derived values"}
    config = {key: value for key, value in run.config.items() if key not in special}
    folded = fold("Configuration", config)
    for key, title in special.items():
        folded += fold(title, run.config.get(key))
    return folded


def fold(title: str, tree: Any) -> str:
    """Return a <details> with the dotted keys of a configuration tree, grouped by their first part."""
    flat = flatten(tree or {})
    if not flat:
        return ""
    groups: dict[str, list[str]] = {}
    for key, value in flat.items():
        group, _, rest = key.rpartition(".")
        groups.setdefault(group, []).append(f"<dt>{escape(rest)}</dt><dd>{escape(show(value))}</dd>")
    blocks = "".join(
        f"<div>{f'<h4>{escape(group)}</h4>' if group else ''}<dl>{''.join(rows)}</dl></div>"
        for group, rows in groups.items()
    )
    return f"<details><summary>{escape(title)}</summary><div class=settings>{blocks}</div></details>"


def show(value: Any) -> str:
    """Return a configuration value as YAML would write it."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, int | float) and abs(value) >= 10_000 and value % 1 == 0:
        return f"{value:,.0f}"
    return str(value)


def footer(notes: list[str]) -> str:
    """Return what could not be read, empty without notes."""
    return f"<footer>{''.join(f'<p>{escape(note)}</p>' for note in notes)}</footer>" if notes else ""
