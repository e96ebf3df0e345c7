"""The configuration of the health checks: when a step counts as a spike and what is done about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from longcat.config_choices import check_choice
from longcat.config_limits import check_at_most
from longcat.errors import ConfigError

MAX_WINDOW = 10_000  # steps


class OnSpike(StrEnum):
    """What follows a spike."""

    report = "report"
    skip = "skip"
    rollback = "rollback"
    stop = "stop"


@dataclass
class HealthConfig:
    """Spikes of the loss and of the gradient norm, and dead experts (docs/guide/health.md).

    A spike is a value far above those of the last steps: its logarithm is more than `sigmas` robust standard deviations
    above the median of the newer quarter of the window. Window and limit are those of OLMo-core's optimizer that skips
    steps.
    """

    # report = say it and train on; skip = leave the batch out: weights, moments and biases stay; rollback = back to the
    # last checkpoint and leave out the batches since then; stop = end with exit code 4
    on_spike: OnSpike = OnSpike.report
    window: int = 128  # steps that a step is compared with, from half of them on; 0 = no detection of spikes
    sigmas: float = 6.0  # robust standard deviations above the last steps from which a value is a spike
    # skips and rollbacks within `forget_after` steps; one spike more ends the run with exit code 4
    max_actions: int = 10
    forget_after: int = 10_000  # steps after which a skip or rollback no longer counts; 0 = all count
    # global batches, up to the one that spiked, that a rollback leaves out; null = all since the checkpoint
    rollback_batches: int | None = None
    dead_after: int = 100  # steps without a token after which an expert is reported as dead; 0 = never

    def validate(self) -> None:
        check_choice("health.on_spike", self.on_spike, OnSpike)
        for name in ("window", "forget_after", "dead_after"):
            if getattr(self, name) < 0:
                raise ConfigError(f"health.{name}={getattr(self, name)} must not be negative")
        check_at_most("health.window", self.window, MAX_WINDOW, "each step sorts it, and each checkpoint holds it")
        if 0 < self.window < 8:
            raise ConfigError(f"health.window={self.window} is too short to judge by; use at least 8, or 0 for none")
        if not self.window and self.on_spike != OnSpike.report:
            raise ConfigError(
                f"health.on_spike={self.on_spike} acts on spikes and health.window=0 finds none; change either"
            )
        if not self.sigmas > 0:
            raise ConfigError(f"health.sigmas={self.sigmas} must be above 0")
        if self.max_actions < 1:
            raise ConfigError(
                f"health.max_actions={self.max_actions} must be at least 1; health.on_spike=stop ends the run at the "
                f"first spike"
            )
        if self.rollback_batches is not None and self.rollback_batches < 1:
            raise ConfigError(
                f"health.rollback_batches={self.rollback_batches} must be at least 1, or null for all since the "
                f"checkpoint"
            )
