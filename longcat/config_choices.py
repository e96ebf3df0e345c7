"""Configuration keys with a fixed set of values: a StrEnum each, whose members are named like their values.

OmegaConf reads and writes a member by its name, so name and value are the same. An attribute set from Python may be a
plain string; `check_choice` refuses one that is no member.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from longcat.errors import ConfigError


def listed(values: Iterable[str]) -> str:
    """Values as in a sentence: `a, b or c`."""
    *others, last = values
    return f"{', '.join(others)} or {last}" if others else last


def unknown_choice(key: str, value: str, choices: Iterable[str]) -> ConfigError:
    """The error for a value that is none of the choices."""
    return ConfigError(f"{key}={value} is not known; use {listed(choices)}")


def check_choice(key: str, value: str, choices: type[Enum]) -> None:
    """Raise ConfigError where ``value`` is none of the choices."""
    values = [choice.value for choice in choices]
    if value not in values:
        raise unknown_choice(key, value, values)
