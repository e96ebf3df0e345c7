"""Which steps are profiled: the `profile` section of the configuration."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from longcat.errors import ConfigError

MAX_STEPS = 100  # a step's trace takes seconds to write, and megabytes


@dataclass
class ProfileConfig:
    """Which steps are profiled."""

    # steps to profile, counted from 1: 10, 10-12 or [3,10-12]; at most 100, none beyond train.steps; empty = none
    steps: Any = ""

    def validate(self) -> None:
        steps_of(self.steps)

    def validate_steps(self, last: int) -> None:
        """Refuse steps that a run of ``last`` steps does not have."""
        beyond = [step for step in steps_of(self.steps) if step > last]
        if beyond:
            raise ConfigError(
                f"profile.steps={written(self.steps)} asks for step {beyond[0]}, but train.steps={last} is the last "
                f"one; name steps from 1 to {last}"
            )


def steps_of(value: Any) -> list[int]:
    """The numbers of the steps that ``profile.steps`` names, rising.

    Raises:
        ConfigError: it is neither a number nor a range nor a list of these, or too many steps.
    """
    if value is None:
        return []
    words = [str(word).strip() for word in (value if isinstance(value, list) else str(value).split(","))]
    found: set[int] = set()
    for word in words if words != [""] else []:
        match = re.fullmatch(r"(\d{1,12})(?:-(\d{1,12}))?", word)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last:
            raise ConfigError(
                f"profile.steps={written(value)}: {word!r} is no step; write 10, 10-12 or a list such as [3,10-12]"
            )
        if last - first >= MAX_STEPS or len(found | set(range(first, last + 1))) > MAX_STEPS:
            raise ConfigError(f"profile.steps={written(value)} asks for more than {MAX_STEPS} steps; name fewer")
        found |= set(range(first, last + 1))
    return sorted(found)


def written(value: Any) -> str:
    """As a person gives it: `[3,10-12]`."""
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
