"""The configuration composed by Hydra from defaults and overrides; errors name the key and its nearest neighbour."""

from __future__ import annotations

import difflib
import re
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from longcat.config_choices import unknown_choice
from longcat.errors import ConfigError
from train.config import Config, RunConfig
from train.spelling import keep_spelling

GROUPS = ("model", "data", "schedule", "experiment")  # folders of configs/; each of their files is a choice


def register() -> None:
    """Register the typed tree with Hydra under the name `schema`."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def compose(overrides: list[str]) -> Config:
    """Compose and validate the configuration from `key=value` overrides.

    Raises:
        ConfigError: an unknown key (with the nearest one), a wrong type, a missing choice, or impossible sizes.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    register()
    check_keys(overrides)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("configs", version_base="1.3"):
            tree = hydra_compose("config", overrides=[keep_spelling(override) for override in overrides])
        config = from_tree(tree)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error
    config.validate()
    return config


def named_folder(overrides: list[str]) -> Path | None:
    """The run folder that ``overrides`` select, without composing them, since they may be wrong. None if unknown."""
    given = dict(override.split("=", maxsplit=1) for override in overrides if "=" in override)
    if "experiment" in given and "run.name" not in given:
        return None
    run = RunConfig(name=given.get("run.name", RunConfig.name), dir=given.get("run.dir", RunConfig.dir))
    try:
        run.validate()
    except ConfigError:
        return None
    return run.folder


def from_tree(tree: Any) -> Config:
    """A Hydra tree → the typed configuration."""
    from omegaconf import OmegaConf

    config = OmegaConf.to_object(tree)
    if not isinstance(config, Config):
        raise ConfigError("the configuration does not start from the schema; keep `- schema` first in its defaults")
    return config


def check_keys(overrides: list[str]) -> None:
    """Raise ConfigError for an override whose key is not in the schema, with the nearest one."""
    sections = {section.name for section in fields(Config)}
    known = {*leaf_keys(Config), *sections, *GROUPS}
    for override in overrides:
        key = re.split(r"=", override, maxsplit=1)[0]
        if "=" not in override and not override.startswith("~"):
            raise ConfigError(f"{override!r} is no override; write key=value, for instance train.steps=100")
        key = key.lstrip("+~").split("@")[0]
        if key in GROUPS and re.fullmatch(r"[^=]*=(null|)", override):
            raise ConfigError(f"{override!r} names no choice; give the name of a file in configs/{key}")
        if key.startswith("hydra") or key in known or any(name.startswith(f"{key}.") for name in known):
            continue
        if re.sub(r"\.\d+(\..*)?$", "", key) in known:
            continue
        candidates = leaf_keys(Config) if "." in key else [*sections, *GROUPS]
        nearest = difflib.get_close_matches(key, sorted(candidates), n=1, cutoff=0.0)
        raise ConfigError(f"unknown key {key!r}; the nearest is {nearest[0]!r}")


def leaf_keys(kind: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a tree of dataclasses."""
    from typing import get_type_hints

    keys = []
    for name, annotation in get_type_hints(kind).items():
        if is_dataclass(annotation):
            keys += leaf_keys(annotation, f"{prefix}{name}.")
        else:
            keys.append(f"{prefix}{name}")
    return keys


def one_line(error: BaseException) -> str:
    """A Hydra or OmegaConf error in one line, with the remedy."""
    if refused := re.search(
        r"Invalid value '(.*)', expected one of \[(.*)\]\s+full_key: (\S+)", str(error.__cause__ or error)
    ):
        value, choices, key = refused.groups()
        return str(unknown_choice(key, value, choices.split(", ")))
    text = str(error).split("Config search path")[0]
    cause = error.__cause__
    if cause is not None and str(cause) not in text:
        text = f"{text}\n{cause}"
    if (override := getattr(error, "override", None)) and override not in text:
        text = f"{override}: {text}"
    lines = [line.strip() for line in text.splitlines()]
    skip = ("object_type", "reference_type", "Set the environment", "See https", "To append", "Did you mean")
    kept = [line.rstrip(".;") for line in lines if line and not line.startswith(skip)]
    if kept[0].startswith("In 'config'"):  # a missing choice of a group, with one choice per line
        return f"{kept[0].partition(': ')[2]}; use {', '.join(kept[2:])}"
    key = next((line.partition(": ")[2] for line in kept if line.startswith("full_key")), None)
    kept = [line.removeprefix("Error merging override ") for line in kept if not line.startswith("full_key")]
    return ": ".join(kept) + ("" if key is None else f"; {default_of(key)}")


def default_of(key: str) -> str:
    """The remedy for a key whose value does not fit: its default."""
    value: Any = Config()
    for part in re.split(r"[.\[]", key.partition("[")[0]):
        if not hasattr(value, part):
            return f"correct {key}"
        value = getattr(value, part)
    value = value.value if isinstance(value, Enum) else value
    return f"{key} is a section: set its keys" if is_dataclass(value) else f"the default of {key} is {value!r}"
