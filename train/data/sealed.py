"""JSON files that carry a hash of their own contents, so that a changed byte is noticed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from longcat.json_text import dumps
from train.checkpoint.files import HASH, new_hash, write_synced


class DamagedError(ValueError):
    """A file whose contents are not those that were written."""


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Write ``values`` and their hash as indented JSON, synced."""
    text = dumps(values | {HASH: _hash(values)}, indent=2, ensure_ascii=False) + "\n"
    write_synced(path, text)


def read_sealed(path: Path, required: bool = True) -> dict[str, Any]:
    """The values of a file that `write_sealed` wrote.

    Args:
        required: whether a file without a hash is an error.

    Raises:
        FileNotFoundError: it does not exist.
        DamagedError: it is no such JSON, or its contents have changed.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DamagedError(f"{type(error).__name__}: {error}") from error
    if not isinstance(values, dict):
        raise DamagedError(f"it holds a {type(values).__name__}")
    wanted = values.pop(HASH, None)
    if wanted is None and not required:
        return values
    if wanted != _hash(values):
        raise DamagedError("its contents are not those that were written")
    return values


def _hash(values: dict[str, Any]) -> str:
    return str(new_hash(dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest())
