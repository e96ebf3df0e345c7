"""Lines of JSON, JSON files and YAML files that carry a hash of what they say, so that a changed digit is noticed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from longcat.json_text import dumps
from train.checkpoint.files import HASH, new_hash, read_text, regular, write_synced

MARK = f', "{HASH}": "'  # begins the hash of a line, its last key
ENDS_WITH_HASH = re.compile(rb'"[0-9a-f]{32}"\}\s*\Z')  # whatever the name of its key is now
YAML_MARK = f"# {HASH}: "
YAML_ENDS_WITH_HASH = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}\s*\Z")
CHANGED = "its contents are not those that were written"


class DamagedError(ValueError):
    """Values that are not those that were written."""


def seal_line(values: dict[str, Any]) -> str:
    """``values``, of which there is at least one, as JSON in one line, with the hash of that text as its last key."""
    text = dumps(values)
    return f'{text[:-1]}{MARK}{_hash(text)}"}}'


def unseal_line(line: str | bytes) -> dict[str, Any]:
    """The values of a line of `seal_line`, without their hash; of one without a hash, as older versions wrote, all.

    Other white space between the values does not matter.

    Raises:
        DamagedError: the values have changed.
        ValueError: it is no JSON object.
    """
    text = line.encode() if isinstance(line, str) else line
    try:
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not an object")
        wanted = values.pop(HASH, None)
        if wanted is None:
            is_intact = ENDS_WITH_HASH.search(text) is None
        else:
            before, mark, end = text.rstrip().rpartition(MARK.encode())
            is_intact = bool(mark) and end == f'{wanted}"}}'.encode() and wanted == _hash(before + b"}")
            is_intact = is_intact or wanted == _hash(dumps(values))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not is_intact:
        raise DamagedError(CHANGED)
    return values


def unseal_lines(path: Path) -> Iterator[dict[str, Any] | ValueError]:
    """Each line of a .jsonl file in order: its object, or the error why it has none.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb", opener=regular) as lines:
        for line in lines:
            try:
                yield unseal_line(line)
            except ValueError as error:
                yield error


def intact_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; lines that cannot be read are left out, as a kill leaves them.

    Raises:
        OSError: the file cannot be read.
        DamagedError: a line has changed; the message has its number.
    """
    found = []
    for number, line in enumerate(unseal_lines(path), 1):
        if isinstance(line, DamagedError):
            raise DamagedError(f"{path}, line {number}: {line}")
        if not isinstance(line, ValueError):
            found.append(line)
    return found


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """Write ``values`` and their hash as indented JSON, synced."""
    write_synced(path, dumps(values | {HASH: _hash_of_values(values)}, indent=2, ensure_ascii=False) + "\n")


def read_sealed(path: Path, required: bool = True) -> dict[str, Any]:
    """The values of a file that `write_sealed` wrote.

    Args:
        required: whether a file without a hash is an error.

    Raises:
        FileNotFoundError: it does not exist.
        DamagedError: it is no such JSON, or its contents have changed.
    """
    try:
        values = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{type(error).__name__}: {error}") from error
    if not isinstance(values, dict):
        raise DamagedError(f"it holds a {type(values).__name__}")
    wanted = values.pop(HASH, None)
    if wanted is None and not required:
        return values
    if wanted != _hash_of_values(values):
        raise DamagedError(CHANGED)
    return values


def seal_yaml(text: str) -> str:
    """A YAML file's text with its hash in a comment at its end."""
    return f"{text}{YAML_MARK}{_hash(text)}\n"


def is_yaml_changed(text: str) -> bool:
    """Whether a text of `seal_yaml` is another one now; False for one without a hash, as older versions wrote it."""
    before, mark, stored = text.rpartition(YAML_MARK)
    if not mark:
        return YAML_ENDS_WITH_HASH.search(text) is not None
    return stored.rstrip() != _hash(before)


def _hash(text: str | bytes) -> str:
    content = text.encode(errors="replace") if isinstance(text, str) else text
    return str(new_hash(content).hexdigest())


def _hash_of_values(values: dict[str, Any]) -> str:
    return _hash(dumps(values, sort_keys=True, ensure_ascii=False))
