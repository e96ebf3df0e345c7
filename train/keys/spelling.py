"""Values of text keys as the user spells them: `run.name=1e-3` is the name 1e-3, not 0.001."""

from __future__ import annotations

import re
from dataclasses import is_dataclass
from functools import cache
from types import NoneType
from typing import Any, get_args, get_type_hints

from train.config import Config

# What Hydra's grammar reads as a number or a truth value, not as text
NOT_TEXT = re.compile(
    r"[+-]?(\d[\d_]*(\.[\d_]*)?|\.[\d_]+)(e[+-]?[\d_]+)?|[+-]?(inf|nan)|true|false", re.ASCII | re.IGNORECASE
)


def keep_spelling(override: str) -> str:
    """``override`` with quotes where its key takes text and its value would be read as something else."""
    key, equals, value = override.partition("=")
    optional = text_keys().get(key.lstrip("+"))
    if not equals or optional is None:
        return override
    is_text_null = value.lower() == "null" and not optional
    return f"{key}='{value}'" if is_text_null or NOT_TEXT.fullmatch(value) else override


@cache
def text_keys() -> dict[str, bool]:
    """Dotted key → whether null is a value of it, for each key whose value is text."""
    return dict(_text_keys(Config))


def _text_keys(kind: Any, prefix: str = "") -> list[tuple[str, bool]]:
    found = []
    for name, annotation in get_type_hints(kind).items():
        if is_dataclass(annotation):
            found += _text_keys(annotation, f"{prefix}{name}.")
        elif annotation is str or set(get_args(annotation)) == {str, NoneType}:
            found.append((f"{prefix}{name}", annotation is not str))
    return found
