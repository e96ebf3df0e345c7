"""The configuration section `pruning`."""

from __future__ import annotations

from dataclasses import dataclass

from longcat.errors import ConfigError


@dataclass
class PruningConfig:
    """Early end of hopeless runs of a sweep, by the percentile rule of Optuna's pruners (docs/guide/sweeps.md)."""

    # end a run whose validation loss is above this percentile of the finished runs' at the same step; 50 = median,
    # 0 = off. Only runs of as many parameters, the same held-out text and batches are compared
    percentile: float = 0.0
    min_runs: int = 5  # finished runs to compare with, from which on runs end early
    min_steps: int = 0  # steps that every run makes

    def validate(self) -> None:
        if not 0 <= self.percentile < 100:
            raise ConfigError(f"pruning.percentile={self.percentile} must be below 100, or 0 for off")
        if self.min_runs < 1:
            raise ConfigError(f"pruning.min_runs={self.min_runs} must be at least 1")
        if self.min_steps < 0:
            raise ConfigError(f"pruning.min_steps={self.min_steps} must not be negative")
