"""Options of the verbs that take no run configuration: `key=value` arguments read into a dataclass."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from dataclasses import is_dataclass
from enum import Enum
from typing import Any, TypeVar, get_type_hints

from longcat.config_choices import unknown_choice
from longcat.errors import ConfigError

Options = TypeVar("Options")
NEAR = 0.8  # difflib's ratio from which a key is an option misspelt
PATHS = ("source", "target", "tokenizer", "proxy", "cluster")  # options that are paths


def read_options(kind: type[Options], arguments: list[str]) -> Options:
    """Options from `key=value` arguments; a nested dataclass has dotted keys. A value is plain text.

    Raises:
        ConfigError: an argument that is not key=value, an unknown key (with the nearest one), or a wrong type.
    """
    options, rest = split_options(kind, arguments)
    known = sorted(dict(typed_keys(kind)))
    for argument in rest:
        key, equals, _ = argument.partition("=")
        if not equals:
            raise ConfigError(f"{argument!r} is no option; write key=value, for instance {known[0]}=…")
        raise ConfigError(f"unknown key {key!r}; the nearest is {difflib.get_close_matches(key, known, 1, 0.0)[0]!r}")
    return options


def split_options(kind: type[Options], arguments: list[str]) -> tuple[Options, list[str]]:
    """The options of ``kind`` among ``arguments``, and the other arguments, which may be keys of a run.

    Raises:
        ConfigError: an option of a wrong type, or a key that no run has and that is nearly an option's.
    """
    types, rest = dict(typed_keys(kind)), []
    options = kind()
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or key not in types:
            if equals:
                refuse_misspelt(key, list(types))
            rest.append(argument)
            continue
        *sections, name = key.split(".")
        section: Any = options
        for part in sections:
            section = getattr(section, part)
        text = os.path.expanduser(text) if name in PATHS else text  # some shells expand ~ only where a word begins
        setattr(section, name, convert(key, text, types[key]))
    return options, rest


def refuse_misspelt(key: str, options: list[str]) -> None:
    """Raise ConfigError for a key that is nearly one of ``options`` and that no run has."""
    from train.compose import leaf_keys
    from train.config import Config

    near = difflib.get_close_matches(key, options, 1, cutoff=NEAR)
    if near and key not in leaf_keys(Config):
        raise ConfigError(f"unknown key {key!r}; the nearest is {near[0]!r}")


def typed_keys(kind: type[Any], prefix: str = "") -> Iterator[tuple[str, type[Any]]]:
    """(dotted key, type) of each option in a tree of dataclasses."""
    for name, annotation in get_type_hints(kind).items():
        if is_dataclass(annotation):
            yield from typed_keys(annotation, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}", annotation


def convert(key: str, text: str, kind: type[Any]) -> Any:
    """``text`` as a value of type ``kind``; raises ConfigError if it is not one."""
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{key}={text} must be true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        if issubclass(kind, Enum):
            raise unknown_choice(key, text, [str(choice.value) for choice in kind]) from error
        wanted = {int: "a whole number", float: "a number"}
        raise ConfigError(f"{key}={text} must be {wanted[kind]}") from error
