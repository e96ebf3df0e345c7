"""Limits of the configuration's numbers: what float32, 32-bit and 64-bit integers can hold."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

from longcat.errors import ConfigError

INT32_MAX = 2**31 - 1
INT64_MAX = 2**63 - 1
FLOAT32_MAX = 3.4028234663852886e38
FLOAT32_TINY = 1.1754943508222875e-38  # smaller ones lose digits, and are 0 where a device flushes them


CHECKED_IN_TRAINING = ("balance.k",)  # gains: a step whose biases are not finite ends the run with exit code 4


def check_numbers(values: dict[str, Any]) -> None:
    """Check every number of {dotted key: value}, also those inside lists, against the types that will hold it.

    Raises:
        ConfigError: a float is not finite, too large for float32, or not 0 but 0 in float32; or an integer has more
        than 64 bits.
    """
    for key, value in values.items():
        for number in _numbers(value):
            if isinstance(number, int):
                if abs(number) > INT64_MAX:
                    raise ConfigError(f"{key} has {len(hex(number)) - 2} hexadecimal digits: more than 64 bits hold")
            elif not math.isfinite(number):
                raise ConfigError(f"{key}={number} must be a finite number")
            elif abs(number) > FLOAT32_MAX and not key.startswith(CHECKED_IN_TRAINING):
                raise ConfigError(f"{key}={number} is infinite in float32; use at most {FLOAT32_MAX:.3g}")
            elif 0 < abs(number) < FLOAT32_TINY:
                raise ConfigError(f"{key}={number} is 0 in float32; use at least {FLOAT32_TINY:.3g}")


def check_items(section: Any, prefix: str) -> None:
    """Check the types of what lists hold, which OmegaConf leaves unchecked where it is a list or a mapping.

    Raises:
        ConfigError: a list of numbers or of texts below ``section`` holds something else.
    """
    for name, annotation in get_type_hints(type(section)).items():
        key, value = f"{prefix}{name}", getattr(section, name)
        if is_dataclass(value):
            check_items(value, f"{key}.")
        elif isinstance(value, list) and (kind := next(iter(get_args(annotation)), None)) in (float, int, str):
            types = (int, float) if kind is float else (kind,)
            if not all(isinstance(item, types) and not isinstance(item, bool) for item in value):
                named = "text" if kind is str else "number"
                raise ConfigError(f"{key}={value}: each item must be a {named}")
        elif isinstance(value, list):
            for number, item in enumerate(value):
                if is_dataclass(item):
                    check_items(item, f"{key}[{number}].")


def check_at_most(key: str, value: float, most: float, why: str = "") -> None:
    """Raise ConfigError where ``value`` is above ``most``; ``why`` is a clause that gives the reason."""
    if value > most:
        raise ConfigError(f"{key}={value} must be at most {most}" + (f": {why}" if why else ""))


def _numbers(value: Any) -> Iterator[int | float]:
    if isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, dict):
        yield from _numbers(list(value.values()))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield value
