"""Values of a JSON file that somebody else wrote: read whole, no name twice, and of the type that is needed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from longcat.errors import ConfigError
from train.checkpoint.files import read_text


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: it cannot be read, is no object, or has a name twice; with ``remedy``.
    """

    def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found and found[name] != value:
                raise ValueError(f"{name} occurs twice, with different values")
            found[name] = value
        return found

    try:
        tree = json.loads(read_text(path), object_pairs_hook=without_doubles)
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); {remedy}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} cannot be read (it is no JSON object); {remedy}")
    return tree


def number(path: Path, name: str, value: Any, real: bool = False) -> Any:
    """``value`` of a field, if it is an integer, or with ``real`` any finite number.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 53:
        return value
    if real and isinstance(value, float) and math.isfinite(value):
        return value
    raise ConfigError(f"{path}: {name} is {value!r}; it must be {'a number' if real else 'a whole number'}, correct it")
