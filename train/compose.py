"""The configuration composed by Hydra from defaults and overrides; errors name the key and its nearest neighbour."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from longcat.config_choices import unknown_choice
from longcat.errors import ConfigError
from train.config import Config, RunConfig
from train.keys.dotted import flatten
from train.keys.spelling import keep_spelling, text_keys
from train.keys.suggestions import closest, nearest_key
from train.sweeps.results import SWEEP_FOLDER

GROUPS = ("model", "data", "schedule", "experiment")  # folders of configs/; each of their files is a choice
CONFIG_DIR = ("--config-dir", "-cd")  # Hydra's names
OWN_FOLDER = "conf"  # beside the run; --config-dir names another
MAX_DIGITS = 4300  # of a number that Python reads
PLAIN = re.compile(r"[\w/\-\\+.$%*@?|:\s]*", re.ASCII)  # what Hydra's grammar takes without quotes
SEARCH_PATH = "hydra.searchpath"
HYDRA_KEYS = ("hydra/launcher", "hydra/sweeper", "hydra.launcher.", "hydra.sweeper.")


def with_search_path(arguments: list[str]) -> list[str]:
    """Overrides with the folder of `--config-dir` as Hydra's search path; without one, `conf` if it exists.

    A folder has the layout of configs/: `DIR/experiment/mine.yaml` is the choice `experiment=mine`.

    Raises:
        ConfigError: no such folder, or a choice that configs/ has too.
    """
    overrides, folders = [], []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if flag not in CONFIG_DIR:
            overrides.append(argument)
            continue
        folders.append(value if equals else next(rest, ""))
    if any(override.startswith(SEARCH_PATH) for override in overrides):
        if folders:
            raise ConfigError(f"--config-dir and {SEARCH_PATH} both name folders of choices; give one of them")
        return overrides
    if len(folders) > 1:
        raise ConfigError(f"--config-dir is given {len(folders)} times; give one folder")
    folder = Path(os.path.expanduser(folders[0]) if folders else OWN_FOLDER)
    if not folder.is_dir() or folders == [""]:
        if folders:
            raise ConfigError(f"--config-dir {folders[0]} is no folder; give one with experiment/NAME.yaml in it")
        return overrides
    check_text(str(folder))
    check_own_choices(folder)
    return [*overrides, f"{SEARCH_PATH}=[{quoted(f'file://{folder.resolve()}')}]"]


def quoted(text: str) -> str:
    """``text`` as a string of Hydra's grammar of overrides: backslashes count there only before a quote or `${`."""
    for special in (r"\$\{", "'"):
        text = re.sub(rf"(\\*)({special})", r"\1\1\\\2", text)
    return "'" + re.sub(r"(\\+)\Z", r"\1\1", text) + "'"


def check_own_choices(folder: Path) -> None:
    """Raise ConfigError where a file in ``folder`` has the name of a choice of configs/, which would win silently."""
    import configs

    for group in GROUPS:
        for path in sorted((folder / group).glob("*.yaml")):
            if (Path(configs.__file__).parent / group / path.name).is_file():
                raise ConfigError(
                    f"{path} has the name of a built-in choice, {group}={path.stem}; rename the file, or name "
                    f"another folder with --config-dir"
                )


def register() -> None:
    """Register the typed tree with Hydra under the name `schema`."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)


def compose(arguments: list[str]) -> Config:
    """Compose and validate the configuration from `key=value` overrides and `--config-dir DIR`.

    Raises:
        ConfigError: an unknown key (with the nearest one), a wrong type, a missing choice, or impossible sizes.
    """
    overrides = with_search_path(arguments)
    check_keys(overrides)
    try:
        config = from_tree(compose_tree(overrides))
    except ConfigError:
        raise
    except Exception as error:  # a wrong override also raises TypeError, ValueError, RecursionError, YAMLError …
        raise ConfigError(one_line(error)) from error
    config.validate()
    return config


def compose_tree(overrides: list[str], sweep: bool = False) -> Any:
    """The configuration as Hydra's tree, not validated; raises errors of several libraries.

    Raises:
        ConfigError: an experiment's file sets one of Hydra's own settings, which has no effect; see `check_keys` for
            those that a ``sweep`` takes.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra

    register()
    GlobalHydra.instance().clear()
    with initialize_config_module("configs", version_base="1.3"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="provider=hydra.searchpath")  # a folder that does not exist
        check_files(overrides, sweep)
        return hydra_compose("config", overrides=[as_hydra_reads(override) for override in overrides])


def check_files(overrides: list[str], sweep: bool) -> None:
    """Raise ConfigError for a setting of Hydra's in the user's own files that has no effect.

    Hydra must be set up. A sweep's file is also that of its runs, which compose it again.
    """
    import yaml
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.types import RunMode

    sweep = sweep or SWEEP_FOLDER in os.environ
    given = OverridesParser.create().parse_overrides([as_hydra_reads(override) for override in overrides])
    lists = [each.value() for each in given if each.key_or_group == SEARCH_PATH]
    searched = [folder for folders in lists if isinstance(folders, list) for folder in folders]
    if not searched or not any(each.key_or_group == "experiment" for each in given):
        return  # a file of another group lies below its group and cannot name them
    loader = GlobalHydra.instance().config_loader()
    found = loader.compute_defaults_list("config", [each.input_line or "" for each in given], RunMode.RUN)
    for path in (
        Path(str(folder).removeprefix("file://")) / f"{one.config_path}.yaml"
        for folder in searched
        for one in found.defaults
    ):
        settings = (yaml.safe_load(path.read_text()) if path.is_file() else None) or {}
        for key in flatten({"hydra": settings["hydra"]}) if "hydra" in settings else ():
            check_hydra_key(f"{path}: {key}", key, sweep)
    for one in found.defaults:
        plain = one.config_path in (None, "hydra/launcher/basic", "hydra/sweeper/basic")
        if not plain and one.config_path.startswith(("hydra/launcher/", "hydra/sweeper/")):
            check_hydra_key(f"override /{one.config_path}", one.config_path, sweep)


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


def check_keys(overrides: list[str], sweep: bool = False) -> None:
    """Raise ConfigError for an override whose key is not in the schema (with the nearest one) or that has no effect.

    Only a ``sweep`` takes those of Hydra's own settings that say how its runs are chosen and started.
    """
    sections = {section.name for section in fields(Config)}
    known = {*leaf_keys(Config), *sections, *GROUPS}
    for override in overrides:
        check_text(override)
        key = override.partition("=")[0]
        if override.startswith("~"):
            raise ConfigError(f"{override!r} takes a key away, and a run needs them all; set it to another value")
        if "=" not in override:
            raise ConfigError(f"{override!r} is no override; write key=value, for instance train.steps=100")
        key = key.lstrip("+")
        if re.match(r"hydra\b", key):
            check_hydra_key(override, key, sweep)
            continue
        if key in GROUPS:
            check_choice_of_group(override, key)
        if key in known or any(name.startswith(f"{key}.") for name in known):
            continue
        if re.sub(r"\.\d+(\..*)?$", "", key) in known:
            continue
        raise ConfigError(f"unknown key {key!r}; the nearest is {nearest_key(key, leaf_keys(Config), GROUPS)!r}")


def check_text(argument: str) -> None:
    """Raise ConfigError for text that neither config.yaml nor a path can hold."""
    try:
        argument.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{argument!r} is not valid UTF-8; rename what it names") from error
    if "\0" in argument:
        raise ConfigError(f"{argument!r} has a zero character; leave it out")
    if digits := re.search(rf"\d{{{MAX_DIGITS + 1},}}", argument):
        raise ConfigError(f"{argument.partition('=')[0]}: a number of {len(digits[0])} digits is too long")


def as_hydra_reads(override: str) -> str:
    """``override`` with quotes where its value has characters that Hydra's grammar takes only inside quotes.

    Those are, for example, umlauts, `=` and `~`: a path or a name is taken as the user writes it. Values with quotes,
    braces or functions are left as they are, unless they are no such thing: `texts (1)` and `it's` are text.
    """
    override = keep_spelling(override)
    key, equals, value = override.partition("=")
    if not equals:
        return override
    if re.search(r"""['"{}()]""", value):
        is_text = key.lstrip("+") in text_keys() and not is_hydra_syntax(override)
        return f"{key}={quoted(value)}" if is_text else override

    def quote(item: re.Match[str]) -> str:
        return item[0] if PLAIN.fullmatch(item[0]) else quoted(item[0])

    return f"{key}={re.sub(r'[^][,]*[^][, ]', quote, value)}"


def is_hydra_syntax(override: str) -> bool:
    """Whether Hydra's grammar takes ``override`` as it is."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        OverridesParser.create().parse_override(override)
    except HydraException:
        return False
    return True


def check_choice_of_group(override: str, group: str) -> None:
    """Raise ConfigError unless the override of a group names one choice."""
    _, equals, value = override.partition("=")
    if equals and value in ("", "null"):
        raise ConfigError(f"{override!r} names no choice; give the name of a file in configs/{group}")
    if value.startswith("["):
        raise ConfigError(f"{override!r} names several choices, and {group} has one; give the name of one file")


def check_hydra_key(override: str, key: str, sweep: bool) -> None:
    """Raise ConfigError for one of Hydra's own settings that would have no effect, or break the run folder."""
    if key == SEARCH_PATH:
        return
    if not key.startswith(HYDRA_KEYS):
        raise ConfigError(
            f"{override!r}: Hydra's own settings are fixed, but for hydra/launcher, hydra/sweeper and the keys below "
            f"them in a sweep; leave it out"
        )
    if not sweep:
        raise ConfigError(f"{override!r} says how a sweep runs, and this is one run; add -m or leave it out")


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
    if isinstance(error, RecursionError):
        return "an interpolation ${…} or an entry of a defaults list leads back to itself; write a value in its place"
    if isinstance(error, UnicodeDecodeError):
        before = error.object[max(0, error.start - 40) : error.start].decode(errors="replace")
        return f"a configuration file is not UTF-8, after {before!r}; save it as UTF-8"
    text = str(error).split("Config search path")[0]
    cause = error.__cause__
    if cause is not None and str(cause) not in text:
        text = f"{text}\n{cause}"
    if (override := getattr(error, "override", None)) and override not in text:
        text = f"{override}: {text}"
    if "does not support sweep type" in text:
        return "interval(…) is for a search: add hydra/sweeper=optuna, or give values, for instance optim.lr=1e-3,3e-3"
    if "Key 'experiment' not in 'Config'" in text:
        return "a file of experiment/ starts with the line `# @package _global_`, or its keys go below `experiment`"
    lines = [line.strip() for line in text.splitlines()]
    if unknown := re.search(r"Key '(.*?)' not in '(\w+)'", text):
        return unknown_in_mapping(unknown[1], unknown[2], lines)
    if missing := re.search(r"missing mandatory value: .*\s+full_key: (\S+)", text):
        return f"{missing[1]} is missing; give it a value"
    skip = ("object_type", "reference_type", "Set the environment", "See https", "To append", "Did you mean")
    kept = [line.rstrip(".;") for line in lines if line and not line.startswith(skip)]
    if not kept:
        return f"the overrides cannot be composed ({type(error).__name__}); check their values"
    if re.match("In '(hydra/)?config'", kept[0]):  # a missing choice of a group, with one choice per line
        return f"{kept[0].partition(': ')[2]}; use {', '.join(kept[2:])}"
    key = next((line.partition(": ")[2] for line in kept if line.startswith("full_key")), None)
    kept = [line.removeprefix("Error merging override ") for line in kept if not line.startswith("full_key")]
    if key and "is not in struct" in text:  # an open mapping of Hydra's, such as a launcher's additional parameters
        return f"{': '.join(kept)}; write +{key}=… to add it"
    return ": ".join(kept) + ("" if not key else f"; {default_of(key)}")


def unknown_in_mapping(name: str, kind: str, lines: list[str]) -> str:
    """An unknown key of a mapping, given as a value or in a file, and the nearest one that its ``kind`` has."""
    key = next((line.partition(": ")[2] for line in lines if line.startswith("full_key")), name)
    place = next((found[1] for line in lines if (found := re.match("(?:Could not override|In) '(.*?)'", line))), "")
    where = f" in {place}" if place and not key.startswith(f"{place}.") else ""
    section, dot, _ = key.rpartition(".")
    known = {one.__name__: [field.name for field in fields(one)] for one in kinds_of_sections(Config)}
    if kind not in known:
        return f"unknown key '{key}'{where}; leave it out"
    return f"unknown key '{key}'{where}; the nearest is '{section}{dot}{closest(name, known[kind])}'"


def kinds_of_sections(kind: Any) -> Iterator[Any]:
    """A dataclass and all that its fields hold, in lists too."""
    from typing import get_args, get_type_hints

    if is_dataclass(kind):
        yield kind
        for annotation in get_type_hints(kind).values():
            yield from kinds_of_sections(annotation)
    for argument in get_args(kind):
        yield from kinds_of_sections(argument)


def default_of(key: str) -> str:
    """The remedy for a key whose value does not fit: its default."""
    value: Any = Config()
    for part in re.split(r"[.\[]", key.partition("[")[0]):
        if not hasattr(value, part):
            return f"correct {key}"
        value = getattr(value, part)
    value = value.value if isinstance(value, Enum) else value
    return f"{key} is a section: set its keys" if is_dataclass(value) else f"the default of {key} is {value!r}"
