"""Words `key=value` of the verbs that take no configuration: read into a dataclass of options, checked one by one."""

from __future__ import annotations

import difflib
from dataclasses import Field, fields
from typing import Any, TypeVar

from longcat.errors import ConfigError

Options = TypeVar("Options")


def key_of(option: Field[Any]) -> str:
    """What a person writes for a field: its name, or the key in its metadata."""
    return str(option.metadata.get("key", option.name))


def read_options(kind: type[Options], words: list[str]) -> Options:
    """Options from words; each has the type of its field's default.

    Raises:
        ConfigError: a word that is no key=value, an unknown key (with the nearest one), or a wrong type.
    """
    options, rest = split_options(kind, words)
    known = sorted(key_of(option) for option in fields(kind))  # type: ignore[arg-type]
    for word in rest:
        key = word.partition("=")[0]
        if "=" not in word:
            raise ConfigError(f"{word!r} is no option; write key=value, for instance {known[0]}=…")
        raise ConfigError(f"unknown key {key!r}; the nearest is {difflib.get_close_matches(key, known, 1, 0.0)[0]!r}")
    return options


def split_options(kind: type[Options], words: list[str]) -> tuple[Options, list[str]]:
    """The options among some words, and the other words."""
    by_key = {key_of(option): option for option in fields(kind)}  # type: ignore[arg-type]
    values, rest = {}, []
    for word in words:
        key, equals, text = word.partition("=")
        if equals and key in by_key:
            values[by_key[key].name] = converted(key, text, by_key[key].default)
        else:
            rest.append(word)
    return kind(**values), rest


def converted(key: str, text: str, default: Any) -> Any:
    """``text`` in the type of ``default``."""
    kind = type(default)
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ConfigError(f"{key}={text} must be true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        words = {int: "a whole number", float: "a number"}
        raise ConfigError(f"{key}={text} must be {words[kind]}") from error
