"""How `longcat train` starts ranks again after a fault."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from longcat.config_choices import check_choice
from longcat.errors import ConfigError
from train.checkpoint.files import read_bytes
from train.run_dir.sealed import unseal_line

MAX_PORT = 65535
GAVE_UP = "gave_up.txt"  # in the run folder: for a person, when restarts were given up
JOURNAL = "launch.jsonl"  # in the run folder: a line for each start, end and end of a command, which the report shows


class OnUnhealthy(StrEnum):
    """What follows numbers that are not finite (exit code 4)."""

    stop = "stop"
    retry = "retry"


class OnStraggler(StrEnum):
    """What follows a rank that is slower than the others for many steps."""

    report = "report"
    restart = "restart"


@dataclass
class LaunchConfig:
    """Start on several machines (docs/guide/machines.md) and restarts without people (docs/guide/unattended.md)."""

    nodes: int = 0  # machines that train, `longcat train` being started on each; 0 = those of the Slurm step, else one
    # host:port of the first node, the same on all; "" takes the first host of Slurm's job and a port from the job's id
    rendezvous: str = ""
    join_seconds: float = 600.0  # how long nodes wait for each other at the start
    node_timeout: float = 30.0  # seconds without a heartbeat after which a node is lost and the others end
    # `longcat train` gives up after this many restarts in a row without a new step; 0 = no restarts
    restarts: int = 0
    backoff_seconds: float = 5.0  # pause after the first start that brought no new step; it doubles, up to 32 times
    # with restarts: stop = exit code 4 ends the run; retry = once more from the last checkpoint, in case a device erred
    on_unhealthy: OnUnhealthy = OnUnhealthy.stop
    # with on_unhealthy=retry: further tries, each from the checkpoint before; those that it passes over are set aside
    max_rollback_checkpoints: int = 1
    max_strikes: int = 3  # faults within `strike_hours` from which a node gets no ranks if the run can do without it
    strike_hours: float = 24.0  # how long a fault counts against its node
    # with restarts on several nodes: go on with fewer data-parallel ranks while nodes are missing
    shrink: bool = False
    # times the median of its pipeline stage that a straggler's time outside exchanges is; 0 = no rank is one
    straggler_factor: float = 2.0
    straggler_steps: int = 20  # steps in a row for which it is, before it is named
    # report = name it; restart = with a spare node, also save and start again with the spare in its node's place
    on_straggler: OnStraggler = OnStraggler.report
    metrics_port: int = 0  # with restarts: serve /metrics for Prometheus on this port of localhost; 0 = off

    def validate(self) -> None:
        check_choice("launch.on_unhealthy", self.on_unhealthy, OnUnhealthy)
        check_choice("launch.on_straggler", self.on_straggler, OnStraggler)
        if self.straggler_factor and not self.straggler_factor > 1:
            raise ConfigError(f"launch.straggler_factor={self.straggler_factor} must be above 1, or 0 to name none")
        if self.straggler_steps < 1:
            raise ConfigError(f"launch.straggler_steps={self.straggler_steps} must be at least 1")
        if self.on_straggler == OnStraggler.restart and not (self.restarts and self.straggler_factor):
            raise ConfigError(
                "launch.on_straggler=restart needs launch.restarts above 0 and a launch.straggler_factor; set them, or "
                "leave it at report"
            )
        if self.nodes < 0:
            raise ConfigError(f"launch.nodes={self.nodes} must be 1 or more, or 0 for the nodes of a Slurm step")
        if self.rendezvous:
            split_address(self.rendezvous)
        for name in ("join_seconds", "node_timeout"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"launch.{name}={getattr(self, name)} must be more than 0")
        for name in ("restarts", "backoff_seconds", "max_rollback_checkpoints"):
            if getattr(self, name) < 0:
                raise ConfigError(f"launch.{name}={getattr(self, name)} must not be negative")
        if self.max_strikes < 1:
            raise ConfigError(f"launch.max_strikes={self.max_strikes} must be at least 1")
        if not self.strike_hours > 0:
            raise ConfigError(f"launch.strike_hours={self.strike_hours} must be more than 0")
        if not 0 <= self.metrics_port <= MAX_PORT:
            raise ConfigError(f"launch.metrics_port={self.metrics_port} must be a port up to {MAX_PORT}, or 0 for off")
        if self.metrics_port and not self.restarts:
            raise ConfigError(
                f"launch.metrics_port={self.metrics_port} is served beside restarts and launch.restarts=0 makes none; "
                f"set launch.restarts or leave the port out"
            )


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `launch.rendezvous`.

    Raises:
        ConfigError: it is no host:port.
    """
    host, _, port = address.rpartition(":")
    if not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) <= MAX_PORT:
        raise ConfigError(f"launch.rendezvous={address} must be host:port, for instance node1:29500")
    return host.strip("[]"), int(port)


def launch_metrics(folder: Path) -> dict[str, float]:
    """`starts/…` metrics of the starts before this one, from what the supervisor has just written; empty without it."""
    try:
        line = unseal_line(read_bytes(folder / JOURNAL).splitlines()[-1])
        found = line["so_far"] if line["event"] == "start" else None
    except (OSError, ValueError, KeyError, IndexError):
        return {}
    if not isinstance(found, dict):
        return {}
    numbers = {key: value for key, value in found.items() if isinstance(value, int | float)}
    return {f"starts/{key}": value for key, value in numbers.items() if math.isfinite(value)}
