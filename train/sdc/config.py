"""Settings of the checks for silent data corruption, and of faults injected to try them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from parallel.sdc.spec import Fault, parse_faults


@dataclass
class SdcConfig:
    """Silent data corruption (SDC): faults injected to try what is noticed."""

    # faults to inject, for tests: one or a list of PLACE/PATTERN[/KEY:VALUE…], see the guide's page on corruption
    inject: Any = field(default_factory=list)

    def validate(self) -> None:
        parse_faults(self.inject)

    @property
    def faults(self) -> list[Fault]:
        """The faults that ``inject`` describes."""
        return parse_faults(self.inject)
