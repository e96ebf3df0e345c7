"""Learning-rate schedules: constant, warm-up/stable/decay and cosine, as a factor of the peak rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from longcat.config_choices import check_choice
from longcat.errors import ConfigError


class ScheduleName(StrEnum):
    """Shape of the schedule after the warm-up."""

    wsd = "wsd"
    constant = "constant"
    cosine = "cosine"


@dataclass
class ScheduleConfig:
    """Learning-rate schedule: warm-up, hold and decay, in absolute steps. `schedule=NAME` sets the shape.

    It never reads `train.steps`, so a run resumed with a larger `train.steps` continues exactly as one that was
    started with it.
    """

    name: ScheduleName = ScheduleName.wsd  # wsd, constant or cosine; `schedule=` sets it
    warmup_steps: int = 100  # steps of the linear warm-up
    decay_start: int | None = None  # wsd: first step of the decay; null = no decay yet
    decay_steps: int = 0  # wsd and cosine: steps of the decay
    final_factor: float = 0.0  # learning rate after the decay, as a factor of the peak

    def validate(self) -> None:
        check_choice("schedule.name", self.name, ScheduleName)
        if self.warmup_steps < 0 or self.decay_steps < 0:
            raise ConfigError("schedule.warmup_steps and schedule.decay_steps must not be negative")
        if not 0.0 <= self.final_factor <= 1.0:
            raise ConfigError(f"schedule.final_factor={self.final_factor} must lie between 0 and 1")
        if self.name == ScheduleName.cosine and self.decay_steps < 1:
            raise ConfigError("schedule=cosine needs schedule.decay_steps, the length of the decay in steps")
        if self.name == ScheduleName.wsd and self.decay_start is not None and self.decay_steps < 1:
            raise ConfigError(
                f"schedule.decay_start={self.decay_start} needs schedule.decay_steps, the length of the decay in steps"
            )
        if self.decay_start is not None and self.decay_start < self.warmup_steps:
            raise ConfigError(
                f"schedule.decay_start={self.decay_start} is inside the warm-up of {self.warmup_steps} steps; raise it"
            )


def rate_factor(config: ScheduleConfig, step: int) -> float:
    """The factor of the peak rate in ``step``, counted from 1."""
    if step <= config.warmup_steps:
        return step / config.warmup_steps
    if config.name == ScheduleName.constant:
        return 1.0
    if config.name == ScheduleName.cosine:
        done = min(1.0, (step - config.warmup_steps) / config.decay_steps)
        return config.final_factor + (1 - config.final_factor) * 0.5 * (1 + math.cos(math.pi * done))
    if config.decay_start is None or step < config.decay_start:
        return 1.0
    done = min(1.0, (step - config.decay_start + 1) / config.decay_steps)
    return 1.0 + (config.final_factor - 1.0) * done
