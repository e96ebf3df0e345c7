"""What changes within a run: phases of the learning rate, stages, the start of MTP, steps left out or undone."""

from __future__ import annotations

import math
from contextlib import suppress
from html import escape
from typing import Any

import numpy as np

from train.data.names import corpus_names
from train.data.stages import Segment, TrainingStage, segments
from train.report.axes import NUMBERED, Axes, ChartMark
from train.report.numbers import percent
from train.report.reading import RunData

MAX_CORPORA = 6  # named in a mixture


def marks_of(run: RunData) -> list[ChartMark]:
    """The events of a run that its configuration, metrics and health.jsonl tell, by step."""
    if not run.columns:
        return []
    found = [*_phases(run), *_stages(run), *_mtp(run), *_spikes(run)]
    first = float(run.columns["step"][0])
    return sorted((mark for mark in found if mark.step >= first), key=lambda mark: mark.step)


def marks_legend(axes: Axes) -> str:
    """The list that says what the numbers above the charts mean; empty without marks."""
    items = [f"<li>{escape(mark.text)}, step {mark.step:,.0f}</li>" for mark in axes.marks]
    more = "<li>Later marks have no number.</li>" if len(items) > NUMBERED else ""
    return f'<ol class=marks aria-label="marks in the charts">{"".join(items)}{more}</ol>' if items else ""


def _phases(run: RunData) -> list[ChartMark]:
    name = run.setting("schedule.name")
    warmup, length = run.number("schedule.warmup_steps") or 0, run.number("schedule.decay_steps")
    start = run.number("schedule.decay_start") if name == "wsd" else None
    found = [ChartMark(warmup, "Warm-up ends")] if warmup > 0 else []
    if name == "cosine" and length:
        found.append(ChartMark(warmup + length, "Cosine decay ends"))
    if start is not None and length:
        found += [ChartMark(start, "Decay of the learning rate starts"), ChartMark(start + length - 1, "Decay ends")]
    return found


def _stages(run: RunData) -> list[ChartMark]:
    """Stages of `data.stages`, each at the first step that has a sample of it."""
    samples, parts = run.columns.get("first_sample"), _segments(run)
    if samples is None or not parts:
        return []
    batch = np.full(len(samples), parts[0].batch)
    for part in parts[1:]:
        batch[samples >= part.start] = part.batch
    found = []
    for part in parts[1:]:
        later = np.flatnonzero(samples + batch > part.start)
        if len(later) and later[0] > 0 and part.stage is not None:
            text = _stage_text(part.stage, run.setting("data.paths"))
            found.append(ChartMark(float(run.columns["step"][later[0]]), text))
    return found


def _segments(run: RunData) -> list[Segment]:
    """The segments of the run's samples; without the stages that a config.yaml edited by hand has wrong."""
    stages, length = run.setting("data.stages"), run.number("train.sequence_length")
    batch = run.number("train.global_batch_size")
    if not isinstance(stages, list) or not length or not batch:
        return []
    known = []
    for stage in stages:
        start = stage.get("start_tokens") if isinstance(stage, dict) else None
        if isinstance(start, int | float) and math.isfinite(start):
            with suppress(TypeError):
                known.append(TrainingStage.from_mapping(stage))
    try:
        return segments(known, int(length), int(batch))
    except (TypeError, ValueError, ArithmeticError):
        return []


def _stage_text(stage: TrainingStage, paths: Any) -> str:
    """What changes with a stage: `Mixture web 70 %, code 30 %; sequences of 1,024 tokens`."""
    parts = []
    if stage.weights:
        over = f" over {stage.ramp_tokens:,} tokens" if stage.ramp_tokens else ""
        parts.append(f"Mixture {_shares(paths, stage.weights)}{over}")
    if stage.sequence_length is not None:
        parts.append(f"sequences of {stage.sequence_length:,} tokens")
    if stage.rope_theta is not None:
        parts.append(f"RoPE base {stage.rope_theta:g}")
    if stage.rope_scaling is not None:
        parts.append(f"YaRN factor {stage.rope_scaling.factor:g}")
    if stage.mtp_weight is not None:
        parts.append(f"MTP weight {stage.mtp_weight:g}")
    text = "; ".join(parts) or "Stage changes"
    return text[0].upper() + text[1:]


def _shares(paths: Any, weights: Any) -> str:
    """A mixture in words: `web 70 %, code 30 %`."""
    usable = isinstance(weights, list) and all(isinstance(weight, int | float) for weight in weights)
    if not usable or not isinstance(paths, list) or len(paths) != len(weights) or not sum(weights) > 0:
        return "changes"
    names = corpus_names([str(path) for path in paths])
    parts = [f"{name} {percent(weight / sum(weights))}" for name, weight in zip(names, weights, strict=True)]
    return ", ".join(parts[:MAX_CORPORA]) + (", …" if len(parts) > MAX_CORPORA else "")


def _spikes(run: RunData) -> list[ChartMark]:
    """Batches that were skipped and rollbacks, these where they went back to."""
    found = []
    for event in run.events or []:
        step, back = event["step"], event.get("to_step")
        if event.get("action") == "skip":
            found.append(ChartMark(float(step), "Spike: the batch is skipped"))
        elif event.get("action") == "rollback" and isinstance(back, int):
            gone = f"{event.get('first_sample')} to {event.get('last_sample')}"
            found.append(ChartMark(float(back), f"Back from a spike at step {step:,}; samples {gone} are left out"))
        elif event.get("action") == "stop":
            found.append(ChartMark(float(step), "A spike ends the run"))
    return found


def _mtp(run: RunData) -> list[ChartMark]:
    steps = run.points("loss_mtp")[0]
    late = len(steps) and steps[0] > run.columns["step"][0]
    return [ChartMark(float(steps[0]), "MTP starts")] if late else []
