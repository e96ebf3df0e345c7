"""JSON and YAML files, and lines of JSON, that carry a hash of what they say, so that a changed digit is noticed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longcat.json_text import dumps
from train.checkpoint.files import HASH, new_hash, write_synced


class DamagedError(ValueError):
    """Values that are not those that were written."""


def seal(values: dict[str, Any]) -> dict[str, Any]:
    """``values`` and, last, their hash under `HASH`."""
    return values | {HASH: _hash(values)}


def unseal(text: str | bytes, required: bool = False) -> dict[str, Any]:
    """The values of a sealed JSON object, without their hash.

    Args:
        text: of a file, or a line.
        required: whether an object without a hash, as older versions wrote them, is an error.

    Raises:
        DamagedError: the values have changed.
        ValueError: it is no JSON object.
    """
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError(f"it holds a {type(values).__name__}, not an object")
    wanted = values.pop(HASH, None)
    if (wanted is not None or required) and wanted != _hash(values):
        raise DamagedError("its contents are not those that were written")
    return values


def unsealed_lines(path: Path) -> Iterator[dict[str, Any] | ValueError]:
    """The objects of a .jsonl file, in the order of its lines, and a ValueError for each line that is none.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as lines:
        for line in lines:
            try:
                yield unseal(line)
            except ValueError as error:
                yield error


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Write ``values`` and their hash as indented JSON, synced."""
    write_synced(path, dumps(seal(values), indent=2, ensure_ascii=False) + "\n")


def read_sealed(path: Path, required: bool = True) -> dict[str, Any]:
    """The values of a file that `write_sealed` wrote.

    Args:
        required: whether a file without a hash is an error.

    Raises:
        FileNotFoundError: it does not exist.
        DamagedError: it is no such JSON, or its contents have changed.
    """
    try:
        return unseal(path.read_text(encoding="utf-8"), required)
    except DamagedError:
        raise
    except ValueError as error:
        raise DamagedError(f"{type(error).__name__}: {error}") from error


def seal_yaml(text: str) -> str:
    """A YAML file's text with its hash in a comment at its end."""
    return f"{text}# {HASH}: {new_hash(text.encode()).hexdigest()}\n"


def is_yaml_changed(text: str) -> bool:
    """Whether a text of `seal_yaml` is another one now; False for one without a hash, as older versions wrote it."""
    before, mark, stored = text.rpartition(f"# {HASH}: ")
    return bool(mark) and stored.rstrip() != new_hash(before.encode(errors="replace")).hexdigest()


def _hash(values: dict[str, Any]) -> str:
    return str(new_hash(dumps(values, sort_keys=True, ensure_ascii=False).encode(errors="surrogatepass")).hexdigest())
