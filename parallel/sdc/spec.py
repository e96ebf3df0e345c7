"""Descriptions of faults to inject, read from `sdc.inject` without torch.

PLACE/PATTERN[/KEY:VALUE…][/persistent]      weight/bits/count:3/step:5/rank:1/name:down
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum

from longcat.config_choices import listed
from longcat.config_limits import INT32_MAX
from longcat.errors import ConfigError
from longcat.faults import Place


class Pattern(StrEnum):
    """How a fault changes values."""

    bits = "bits"  # some bits of one element
    lane = "lane"  # one bit of every 16th element is stuck
    scale = "scale"  # a tile of up to 16 × 16 elements is multiplied
    row = "row"  # a row is replaced by another row


@dataclass(frozen=True)
class InjectedFault:
    """One fault to inject: where, how and when."""

    place: str
    pattern: str
    step: int = 1  # the step in which it strikes
    rank: int = 0  # the rank that it strikes
    call: int = 1  # the number of the call or tensor in that step, among those at this place that match `name`
    name: str = ""  # part of the name of the operator, tensor or transfer; empty = any
    count: int = 3  # bits that `bits` flips
    factor: float = 1.0625  # that `scale` multiplies by
    seed: int = 0  # draws position and bits
    persistent: bool = False  # strike every matching call from that step on, at the same position

    def __str__(self) -> str:
        default = InjectedFault(self.place, self.pattern)
        changed = [
            f"{one.name}:{getattr(self, one.name)}"
            for one in fields(self)[2:-1]
            if getattr(self, one.name) != getattr(default, one.name)
        ]
        return "/".join([self.place, self.pattern, *changed, *["persistent"] * self.persistent])


NUMBERS = {"step": 1, "rank": 0, "call": 1, "count": 1, "seed": 0}  # key → the least value


def parse_faults(given: object) -> list[InjectedFault]:
    """The faults that `sdc.inject` describes: one text, or a list of them.

    Raises:
        ConfigError: a text is no description of a fault.
    """
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ConfigError(f"sdc.inject={given} must be one fault or a list of faults, each as PLACE/PATTERN/KEY:VALUE")
    return [parse_fault(text.strip()) for text in texts if text.strip()]


def parse_fault(text: str) -> InjectedFault:
    """One fault from its description. Raises ConfigError."""
    place, *rest = text.split("/")
    if place not in list(Place):
        raise ConfigError(f"sdc.inject={text}: the place {place} is not known; use {listed(Place)}")
    if not rest:
        raise ConfigError(f"sdc.inject={text}: a pattern is missing; add /bits, /lane, /scale or /row")
    pattern, *settings = rest
    if pattern not in list(Pattern):
        raise ConfigError(f"sdc.inject={text}: the pattern {pattern} is not known; use {listed(Pattern)}")
    values: dict[str, object] = {}
    for setting in settings:
        key, colon, value = setting.partition(":")
        if setting == "persistent":
            values["persistent"] = True
        elif key == "name" and value:
            values["name"] = value
        elif key in (*NUMBERS, "factor") and colon:
            values[key] = _number(text, key, value)
        else:
            raise ConfigError(
                f"sdc.inject={text}: {setting!r} is no setting; use persistent, name:TEXT or a number for one of "
                f"{', '.join((*NUMBERS, 'factor'))}, as in step:5"
            )
    return InjectedFault(place, pattern, **values)  # type: ignore[arg-type]


def _number(text: str, key: str, value: str) -> float | int:
    try:
        number = float(value) if key == "factor" else int(value)
    except ValueError:
        raise ConfigError(f"sdc.inject={text}: {key}:{value} needs a number, as in {key}:2") from None
    if key == "factor":
        if not abs(number) < 1e30:
            raise ConfigError(f"sdc.inject={text}: factor:{value} must be a finite number below 1e30")
    elif not NUMBERS[key] <= number <= INT32_MAX:
        raise ConfigError(f"sdc.inject={text}: {key}:{value} must be from {NUMBERS[key]} to {INT32_MAX}")
    return number
