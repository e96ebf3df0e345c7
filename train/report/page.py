"""The report of one run: header, headline figures, charts by subject, text, configuration, environment."""

from __future__ import annotations

import math
import os
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from train.checkpoint.compatibility import flatten
from train.report import health, learning, routing
from train.report.numbers import DASH, compact, duration, exact, percent, plain, signed_percent
from train.report.page_script import SCRIPT
from train.report.reading import RunData, read_run
from train.report.text_page import text_section
from train.report.theme import style_sheet
from train.report.timeline import timeline_section


def write_report(run_dir: Path) -> Path:
    """Write `<run_dir>/report.html` from the files of the run folder and return its path.

    The page is one file without any external resource. What the run has not measured is left out. Raises
    ConfigError where the folder is no run or its config.yaml cannot be read.
    """
    run = read_run(Path(run_dir))
    sections = [
        ("learning", "Learning", grid(learning.charts(run))),
        ("routing", "Routing", grid(routing.charts(run)) + "".join(routing.blocks(run))),
        ("stability", "Stability", grid(health.stability(run))),
        ("speed", "Speed and memory", grid(health.speed(run))),
        ("timeline", "Timeline", timeline_section(run)),
        ("text", "Compute by token", text_section(run)),
        ("settings", "Settings", settings(run)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{key}">{title}</a>' for key, title, _ in sections)
    body = header(run) + f"<nav>{links}</nav>"
    body += "".join(f'<section id="{key}"><h2>{title}</h2>{html}</section>' for key, title, html in sections)
    return write_page(run.path / "report.html", run.name, body + footer(run.notes))


def write_page(target: Path, title: str, body: str) -> Path:
    """Write the page around `body` and rename it when complete, so that no reader sees half a file."""
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style_sheet()}</style></head>\n"
        f"<body><main>{body}</main><script>{SCRIPT}</script></body></html>\n"
    )
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    unfinished.write_text(page, encoding="utf-8", errors="replace")
    unfinished.replace(target)
    return target


def grid(charts: list[str]) -> str:
    """Lay charts out in two columns; the last of an odd number takes the full width."""
    shown = [chart for chart in charts if chart]
    narrow = [chart for chart in shown if 'class="chart wide"' not in chart]
    if len(narrow) % 2:
        shown[shown.index(narrow[-1])] = narrow[-1].replace('class="chart"', 'class="chart wide"', 1)
    return f"<div class=grid>{''.join(shown)}</div>" if shown else ""


def header(run: RunData) -> str:
    """Return the name, one sentence on the run, the model, the device and the headline figures."""
    facts = "".join(f"<p>{escape(line)}</p>" for line in (model_line(run), device_line(run)) if line)
    figures = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
        for name, value, note in headline(run)
        if value != DASH
    )
    block = f"<dl class=figures>{figures}</dl>" if figures else ""
    return (
        f"<header><p class=kind>Pre-training run</p><h1>{escape(run.name)}</h1>"
        f"<p class=lead>{escape(summary(run))}</p>{facts}{block}</header>"
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
    if isinstance(active, list) and len(active) == 3:
        low, middle, high = (compact(float(value)) for value in active)
        parts.append(f"{middle} of them active per token on average ({low} to {high})")
    name = run.setting("model.name")
    text = "; ".join(parts)
    return f"Model {name}: {text}." if name and text else (f"{text}." if text else "")


def device_line(run: RunData) -> str:
    """Describe the device, the ranks and the dates."""
    device, ranks = run.setting("environment.device"), run.number("environment.world_size")
    parts = [f"{device}" + (f", {ranks:.0f} {'rank' if ranks == 1 else 'ranks'}" if ranks else "")] if device else []
    started = run.setting("environment.started")
    if started:
        parts.append(f"started {datetime.fromisoformat(str(started)):%-d %B %Y, %H:%M} UTC")
    if run.last_written:
        parts.append(f"last step written {run.last_written:%-d %B %Y, %H:%M} UTC")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


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
            "per rank",
        ),
    ]


def _tokens_note(run: RunData) -> str:
    sequences, length = run.number("train.global_batch_size"), run.number("train.sequence_length")
    return f"{compact(sequences * length)} per step" if sequences and length else "seen in training"


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
