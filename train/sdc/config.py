"""Settings of the checks for silent data corruption, and of faults injected to try them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from longcat.errors import ConfigError
from parallel.sdc.spec import InjectedFault, parse_faults


@dataclass
class SdcConfig:
    """Checks for silent data corruption (SDC). A finding ends the run with code 5; nothing corrupt is saved."""

    # steps between checks of messages, gathered weights, one operator call and a tile of the update. A step without
    # them does not notice a transient fault there; a lasting one is noticed in a later one. 0 = no checks at all
    every: int = 1
    # with `every` above 0: compare weights, moments, biases and step counts before each update with what the last one
    # left, and between replicas
    at_rest: bool = True
    # with `every` above 0: steps between replays, in which each rank also computes the step of the neighbouring expert
    # group and both are compared; they cost a step's forward and backward each. 0 = never. It needs two groups with the
    # same weights (dp or fsdp above 1) and parallel.sharding=fsdp, and is off otherwise
    replay_every: int = 1000
    # faults to inject, for tests: one or a list of PLACE/PATTERN[/KEY:VALUE…], see the guide's page on corruption
    inject: Any = field(default_factory=list)

    def validate(self) -> None:
        for key, value in (("every", self.every), ("replay_every", self.replay_every)):
            if value < 0:
                raise ConfigError(f"sdc.{key}={value} must not be negative")
        parse_faults(self.inject)

    @property
    def faults(self) -> list[InjectedFault]:
        """The faults that ``inject`` describes."""
        return parse_faults(self.inject)
