"""What the health checks found: events as data and as sentences, and their file in the run folder."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from train.health.config import OnSpike
from train.new_run import new_run
from train.run_dir.files import LineFile, Note
from train.run_dir.sealed import seal_line

HEALTH = "health.jsonl"


class EventKind(StrEnum):
    """Kinds of lines in health.jsonl."""

    start = "start"  # a start of the run; lines of later steps before it are of steps that are trained again
    spike = "spike"
    dead_expert = "dead_expert"
    expert_revived = "expert_revived"
    small_gradient = "small_gradient"
    gradient_recovered = "gradient_recovered"
    hidden_growth = "hidden_growth"
    straggler = "straggler"
    corpus_worse = "corpus_worse"
    corpus_recovered = "corpus_recovered"


@dataclass(frozen=True)
class HealthEvent:
    """One line of health.jsonl."""

    step: int
    kind: EventKind
    text: str  # for a person
    fields: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> str:
        return seal_line({"step": self.step, "event": str(self.kind), **self.fields, "text": self.text})


@dataclass(frozen=True)
class Spike:
    """A step whose loss or gradient norm is not finite, or far above those of the last steps."""

    step: int
    first_sample: int  # position of its global batch, as `Counters.position`
    loss: float
    grad_norm: float
    reason: str
    action: OnSpike  # what follows; `stop` also if too many skips and rollbacks came before
    num_actions: int  # skips and rollbacks that count, with this one

    @property
    def updates(self) -> bool:
        """Whether the step's update is applied all the same."""
        return self.action == OnSpike.report

    def event(self, consequence: str, **fields: Any) -> HealthEvent:
        """The line about this spike; ``consequence`` says what was done."""
        values = {
            "action": str(self.action),
            "loss": self.loss,
            "grad_norm": self.grad_norm,
            "actions": self.num_actions,
            **fields,
        }
        text = f"step {self.step}: {self.reason}; {consequence}"
        return HealthEvent(self.step, EventKind.spike, text, values)


def dead_expert(step: int, layer: int, expert: int, since: int) -> HealthEvent:
    text = f"expert {expert} of layer {layer} has received no token since step {since}"
    return HealthEvent(step, EventKind.dead_expert, text, {"layer": layer, "expert": expert, "since": since})


def expert_revived(step: int, layer: int, expert: int, since: int) -> HealthEvent:
    text = f"expert {expert} of layer {layer} receives tokens again, after {step - since} steps without"
    fields = {"layer": layer, "expert": expert, "since": since}
    return HealthEvent(step, EventKind.expert_revived, text, fields)


def small_gradient(step: int, part: str, rms: float, eps: float) -> HealthEvent:
    times = f"only {rms / eps:.2g} times" if rms > eps else "not above"
    text = (
        f"step {step}: the gradient RMS of {part} is {rms:.2g}, {times} Adam's ε of {eps:.2g}, which then shrinks the "
        f"updates; {new_run('a lower optim.eps', 'optim.eps')}"
    )
    return HealthEvent(step, EventKind.small_gradient, text, {"part": part, "grad_rms": rms, "eps": eps})


def gradient_recovered(step: int, part: str, rms: float, eps: float) -> HealthEvent:
    text = f"step {step}: the gradient RMS of {part}, {rms:.2g}, is well above Adam's ε again"
    return HealthEvent(step, EventKind.gradient_recovered, text, {"part": part, "grad_rms": rms, "eps": eps})


def hidden_growth(step: int, norm: float, growth: float, steps: int) -> HealthEvent:
    keys = ("loss.hidden_z_weight", "optim.lr")
    text = (
        f"step {step}: the hidden norm has grown {growth:.1f}-fold within {steps} steps, to {norm:.3g}, which often "
        f"precedes loss spikes; {new_run('a higher loss.hidden_z_weight or a lower optim.lr', *keys)}"
    )
    return HealthEvent(step, EventKind.hidden_growth, text, {"hidden_norm": norm, "growth": growth})


class EventLog:
    """Appends events to health.jsonl; a disk that is full costs lines, never the run."""

    def __init__(self, folder: Path, step: int, note: Note) -> None:
        self.file = LineFile(folder / HEALTH, note)
        self.write(HealthEvent(step, EventKind.start, f"started at step {step}"))

    def write(self, event: HealthEvent) -> None:
        self.file.write(event.as_json())

    def close(self) -> None:
        self.file.close()


def number(value: float) -> str:
    """A loss or a norm in a sentence."""
    return f"{value:.4g}" if math.isfinite(value) else str(value)
