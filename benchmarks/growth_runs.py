"""The runs of `benchmarks.growth`: their settings, what they logged, and what they show."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from longcat.counts import flops_per_token
from longcat.growth import GrowthMethod
from train.compose import compose
from train.config import Config
from train.run_dir.sealed import intact_lines

LAYERS, FACTOR, STEPS = 2, 2, 600  # of the shallow run; and of the run from scratch, which sets the FLOPs
MOMENTS = (100, 300, 500)  # steps of the shallow run
METHODS = tuple(GrowthMethod)
NAMES = ["full", "half", *(f"{method}-{moment}" for method in METHODS for moment in MOMENTS)]
SETTINGS = [
    "model=debug", "model.num_mtp_layers=0", "model.embedding_std=0.5", "model.hidden_std=0.07",
    "train.sequence_length=128", "train.global_batch_size=8", "train.micro_batch_size=8", "train.dtype=float32",
    "balance.kp=0.6", "balance.ki=0.5", "balance.smoothing=0.8", "balance.group_loss_weight=1e-4",
    "optim.lr=4e-3", "optim.lr_scale={router: 0.2}", "schedule=constant", "schedule.warmup_steps=20",
    "validation.every=10", "validation.batches=5", "validation.documents=0", "checkpoint.every=100",
    "checkpoint.keep=0", "logging.every=50", "logging.wandb=disabled", "run.num_processes=1",
]  # fmt: skip
Steps = list[dict[str, Any]]  # lines of metrics.jsonl


@dataclass(frozen=True)
class GrowthRun:
    """One run, by its name: `full`, `half`, or `<method>-<moment>`."""

    name: str
    folder: Path

    @cached_property
    def moment(self) -> int:
        """The step at which it grew; 0 for the two runs from scratch."""
        return int(self.name.partition("-")[2] or 0)

    @property
    def method(self) -> str:
        return self.name.partition("-")[0]

    @property
    def path(self) -> Path:
        return self.folder / self.name

    def config(self, seconds: float = 0.0) -> Config:
        depth = LAYERS if self.method == "half" else LAYERS * FACTOR
        words = [f"model.num_layers={depth}", f"run.dir={self.folder}", f"run.name={self.name}"]
        return compose([*SETTINGS, *words, f"train.steps={self.steps}", f"train.stop_after_seconds={seconds}"])

    @property
    def steps(self) -> int:
        """Steps until the FLOPs of the run from scratch are spent, at the expected FFN experts, rounded to tens."""
        share = token_flops(LAYERS) / token_flops(LAYERS * FACTOR)
        if self.method == "half":
            return 10 * round(STEPS / share / 10)
        return 10 * round((self.moment + STEPS - self.moment * share) / 10)

    @property
    def is_complete(self) -> bool:
        return (self.path / "metrics.jsonl").is_file() and self.own_steps()[-1]["step"] == self.steps

    def own_steps(self) -> Steps:
        return intact_lines(self.path / "metrics.jsonl")

    def steps_from_scratch(self) -> Steps:
        """Metrics of each step, with the shallow run's before the growth, and `spent`: FLOPs up to and including it."""
        before = GrowthRun("half", self.folder).own_steps()[: self.moment]
        shallow = self.steps if self.method == "half" else len(before)
        found, spent, tokens = [*before, *self.own_steps()], 0.0, 0
        for number, step in enumerate(found):
            depth = LAYERS if number < shallow else LAYERS * FACTOR
            spent += (step["tokens"] - tokens) * token_flops(depth, step["ffn_experts_per_token"])
            tokens, step["spent"] = step["tokens"], spent
        return found


def token_flops(num_layers: int, ffn_experts: float | None = None) -> float:
    """FLOPs of forward and backward of one token; ``ffn_experts`` in use, None = the expected number."""
    config = settings(num_layers)
    return flops_per_token(config.model, config.train.sequence_length, ffn_experts)


@cache
def settings(num_layers: int) -> Config:
    return compose([*SETTINGS, f"model.num_layers={num_layers}"])


def at(steps: Steps, key: str, value: float) -> float:
    """The validation loss where ``key`` (tokens or spent) reaches ``value``, by linear interpolation."""
    known = [(step[key], step["val_loss"]) for step in steps if step.get("val_loss") is not None]
    for (x0, y0), (x1, y1) in pairwise(known):
        if x0 <= value <= x1:
            return float(y0 + (y1 - y0) * (value - x0) / (x1 - x0))
    return float("nan")


def gap(steps: Steps, full: Steps, key: str) -> float | None:
    """Validation loss minus that of ``full`` at equal ``key``: the mean at ten points of the last tenth of ``full``.

    None where the run ends more than 2 % before ``full``; the missing part is left out of both.
    """
    end = min(last_validated(steps, key), last_validated(full, key))
    if end < 0.98 * full[-1][key]:
        return None
    points = [end * (1 - 0.1 * n / 9) for n in range(10)]
    return sum(at(steps, key, point) - at(full, key, point) for point in points) / len(points)


def last_validated(steps: Steps, key: str) -> float:
    return max((step[key] for step in steps if step.get("val_loss") is not None), default=0.0)


@dataclass(frozen=True)
class Outcome:
    """Results of a run, in nats per token."""

    name: str
    last_step: int  # of `GrowthRun.steps`
    rise: float | None  # of the training loss on the first batch after the growth, over the shallow run's on it
    recovered_after: int | None  # steps until it is no higher than the shallow run's, as a mean over ten steps
    equal_tokens: float | None  # see `gap`
    equal_flops: float | None


def outcome(run: GrowthRun, full: Steps, half: Steps) -> Outcome:
    steps = run.steps_from_scratch()
    shallow = {step["step"]: step["loss"] for step in half}
    gaps = [step["loss"] - shallow[step["step"]] for step in run.own_steps() if run.moment and step["step"] in shallow]
    recovered = next((n for n in range(len(gaps) - 9) if sum(gaps[n : n + 10]) <= 0), None)
    rise = gaps[0] if gaps else None
    equal = gap(steps, full, "tokens"), gap(steps, full, "spent")
    return Outcome(run.name, steps[-1]["step"], rise, recovered, *equal)


def results(folder: Path) -> list[Outcome]:
    """Results of all runs but `full` that have begun."""
    full, half = (GrowthRun(name, folder).steps_from_scratch() for name in ("full", "half"))
    runs = (GrowthRun(name, folder) for name in NAMES[1:])
    return [outcome(run, full, half) for run in runs if (run.path / "metrics.jsonl").is_file()]
