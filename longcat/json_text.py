"""JSON text that every reader accepts: numbers that are not finite are written as strings."""

from __future__ import annotations

import json
import math
from typing import Any

NOT_FINITE = ("NaN", "Infinity", "-Infinity")  # how `dumps` spells such numbers


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps` whose text is always valid JSON.

    JSON has no number for NaN and the infinities, and Python's `NaN` and `Infinity` break other readers. They become
    the strings "NaN", "Infinity" and "-Infinity", as in protobuf's JSON mapping; `float` reads them back.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_spelt(value), allow_nan=False, **options)


def _spelt(value: Any) -> Any:
    """The same tree with a string for each number that is not finite."""
    if isinstance(value, dict):
        return {key: _spelt(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_spelt(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
