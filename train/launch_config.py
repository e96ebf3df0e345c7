"""How `longcat train` starts ranks again after a fault."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from longcat.config_choices import check_choice
from longcat.errors import ConfigError

MAX_PORT = 65535
JOURNAL = "launch.jsonl"  # in the run folder: a line for each start, end and end of a command, which the report shows


class OnUnhealthy(StrEnum):
    """What follows numbers that are not finite (exit code 4)."""

    stop = "stop"
    retry = "retry"


@dataclass
class LaunchConfig:
    """Restarts without people, on one machine (docs/guide/unattended.md)."""

    # starts in a row, after the first, that may bring no new step before `longcat train` gives up; 0 = no restarts
    restarts: int = 0
    backoff_seconds: float = 5.0  # pause after the first start that brought no new step; it doubles, up to 32 times
    # with restarts: stop = exit code 4 ends the run; retry = once more from the last checkpoint, in case a device erred
    on_unhealthy: OnUnhealthy = OnUnhealthy.stop
    metrics_port: int = 0  # with restarts: serve /metrics for Prometheus on this port of localhost; 0 = off

    def validate(self) -> None:
        check_choice("launch.on_unhealthy", self.on_unhealthy, OnUnhealthy)
        for name in ("restarts", "backoff_seconds"):
            if getattr(self, name) < 0:
                raise ConfigError(f"launch.{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.metrics_port <= MAX_PORT:
            raise ConfigError(f"launch.metrics_port={self.metrics_port} must be a port up to {MAX_PORT}, or 0 for off")
        if self.metrics_port and not self.restarts:
            raise ConfigError(
                f"launch.metrics_port={self.metrics_port} is served beside restarts and launch.restarts=0 makes none; "
                f"set launch.restarts or leave the port out"
            )
