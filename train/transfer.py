"""Hyperparameters found on a narrow model, carried to a wide one (section 7 of the report, Table 1).

`s` is the target's width over the proxy's. Table 1 holds for Adam and the standard parameterisation and says what
happens to embedding, hidden matrices and head (longcat/roles.py). What it leaves open is this project's choice, with
reasons in docs/decisions/2026-11-29-transfer.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from longcat.config import ModelConfig
from longcat.config_choices import listed
from longcat.errors import OK, ConfigError
from longcat.roles import RULES, TRAINED, Role
from train.checkpoint.compatibility import given_stages
from train.checkpoint.files import read_text, write_whole
from train.compose import OWN_FOLDER, compose, from_tree, one_line
from train.config import Config
from train.keys.dotted import flatten
from train.run_dir.exit_file import EXIT
from train.run_dir.folder import CONFIG, as_mapping, read_unchanged_config

SECTIONS = ("optim", "schedule", "loss", "balance")  # carried whole; of `data` and `CARRIED` what is no default
BATCH = ("train.sequence_length", "train.global_batch_size")
MICRO_BATCH = "train.micro_batch_size"  # the balance loss is a mean over the tokens of a micro-batch
KEYS = ("train.steps", *BATCH, MICRO_BATCH)
# Sizes that must not change, and those that must grow as the width does
DEPTH = ("num_layers", "num_mtp_layers")
SPARSITY = ("num_experts", "num_zero_experts", "top_k", "expected_ffn_experts")
CONSTANT = ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "routed_scaling_factor")
PROPORTIONAL = ("num_heads", "q_lora_rank", "kv_lora_rank", "ffn_hidden_size", "expert_hidden_size")
CARRIED = ("rope_theta", "rope_scaling", "rms_norm_eps", "latent_norm_eps")  # no sizes: the proxy's, if not given
ALLOWED = ("depth", "sparsity", "batch", "shape", "vocabulary")


@dataclass
class TransferOptions:
    """What may differ although Table 1 says nothing about it."""

    allow: str = ""  # some of depth, sparsity, batch, shape and vocabulary, with commas


@dataclass
class TransferConfig:
    """Options of `longcat transfer`."""

    proxy: str = ""  # a run's folder, or a sweep's for its best run
    target: str = ""  # DIR/experiment/NAME.yaml; empty = conf/experiment/MODEL-from-RUN.yaml
    transfer: TransferOptions = field(default_factory=TransferOptions)

    def validate(self) -> None:
        if not self.proxy:
            raise ConfigError("longcat transfer needs proxy=RUN; say longcat transfer proxy=RUN model=TARGET")
        for name in self.allowed:
            if name not in ALLOWED:
                raise ConfigError(f"transfer.allow={name} is not known; use some of {listed(ALLOWED)}, with commas")

    @property
    def allowed(self) -> list[str]:
        return [name.strip() for name in self.transfer.allow.split(",") if name.strip()]


@dataclass(frozen=True)
class TransferredValue:
    """A value of the target's configuration, and where it comes from."""

    value: Any
    origin: str


def transfer(options: TransferConfig, overrides: list[str], choice: str = "") -> tuple[Path, float]:
    """Write the target's configuration; returns its path and s. ``overrides`` name the target's model and other keys.

    ``choice`` says why it is this proxy, for the header.

    Raises:
        ConfigError: the proxy has no finished run; depth, sparsity, batch or shape differ and are not allowed to; or
        the configuration is not one that `longcat train` accepts.
    """
    options.validate()
    models = [text.partition("=")[2] for text in overrides if text.startswith("model=")]
    model = models[-1] if models else ""
    if not model:
        raise ConfigError("longcat transfer needs model=TARGET, the name of a preset, for instance model=flash")
    if any(text.startswith("experiment=") for text in overrides):
        raise ConfigError(
            "experiment= sets rates of its own, which would replace the transferred ones; name the model and its keys"
        )
    proxy = Path(options.proxy)
    path = target_path(options, model, proxy)
    stored = finished_run(proxy)
    full, plain = compose(overrides), compose([text for text in overrides if text.startswith(("model=", "--config"))])
    given = given_keys(overrides, full, plain)
    width = check_scope(stored, full, given, options.allowed)
    values = carried(stored, plain, width, proxy) | given
    comment = header(proxy, stored, full, width, options.allowed) + ([f"The proxy: {choice}."] if choice else [])
    write(path, comment, model, values)
    try:
        compose([f"experiment={path.stem}", f"--config-dir={path.parent.parent}"])
    except ConfigError:
        path.unlink()
        raise
    return path, width


def target_path(options: TransferConfig, model: str, proxy: Path) -> Path:
    """Where the configuration goes: a file that `experiment=NAME` finds."""
    name = re.sub(r"[^\w.-]", "-", f"{model}-from-{proxy.resolve().name}")
    path = Path(options.target or Path(OWN_FOLDER) / "experiment" / f"{name}.yaml")
    if path.parent.name != "experiment" or path.suffix != ".yaml":
        raise ConfigError(f"target={path} must be DIR/experiment/NAME.yaml, so that experiment=NAME finds it")
    if path.exists():
        raise ConfigError(f"{path} exists; remove it or choose another target=DIR/experiment/NAME.yaml")
    return path


def finished_run(folder: Path) -> dict[str, Any]:
    """The proxy's configuration, with today's defaults for keys that it does not have; raises ConfigError."""
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"proxy={folder} has no {CONFIG}; name the folder of a run, for instance runs/quickstart")
    try:
        said = json.loads(read_text(folder / EXIT))
        code, is_early = said["code"], "stopped_early" in said
    except (OSError, ValueError, KeyError, TypeError):
        code, is_early = None, False
    if code != OK or is_early:
        ended = "has not ended" if code is None else "was stopped early" if is_early else f"ended with exit code {code}"
        raise ConfigError(f"proxy={folder} {ended}; finish the run, or name a run that ended with 0")
    stored, default = read_unchanged_config(folder), as_mapping(Config())
    known = {
        section: {key: value for key, value in stored[section].items() if key in default[section] or section == "model"}
        for section in default
        if section in stored
    }
    try:
        if "model" not in known:
            raise ConfigError("it has no model")
        config = from_tree(OmegaConf.merge(OmegaConf.structured(Config), known))
        config.model.validate()
    except (OmegaConfBaseException, ConfigError) as error:
        raise ConfigError(
            f"{folder / CONFIG} is not a configuration of this version ({one_line(error)}); name another"
        ) from error
    return as_mapping(config)


def given_keys(overrides: list[str], full: Config, plain: Config) -> dict[str, TransferredValue]:
    """The keys that the command line sets, and those of the choices that it makes, for instance schedule=cosine."""
    named = {text.partition("=")[0].lstrip("+") for text in overrides if "=" in text} - {"model"}
    before, after = flatten(as_mapping(plain)), flatten(as_mapping(full))
    return {
        key: TransferredValue(value, "given on the command line")
        for key, value in after.items()
        if value != before[key] or any(key == name or key.startswith(f"{name}.") for name in named)
    }


def check_scope(stored: dict[str, Any], full: Config, given: dict[str, TransferredValue], allowed: list[str]) -> float:
    """s; raises ConfigError where the models differ in more than their width, unless that is allowed."""
    old, new = ModelConfig.from_mapping(stored["model"]), full.model
    width = Fraction(new.hidden_size, old.hidden_size)
    found: dict[str, list[str]] = {kind: [] for kind in ALLOWED}
    for kind, names in (("depth", DEPTH), ("sparsity", SPARSITY), ("shape", CONSTANT), ("vocabulary", ("vocab_size",))):
        found[kind] += [
            f"model.{name} is {getattr(new, name)} and the proxy's {getattr(old, name)}"
            for name in names
            if getattr(new, name) != getattr(old, name)
        ]
    found["shape"] += [
        f"model.{name} is {getattr(new, name)} and not {float(width):g} times the proxy's {getattr(old, name)}"
        for name in PROPORTIONAL
        if getattr(new, name) != width * getattr(old, name)
    ]
    old_keys = flatten(stored)
    found["batch"] += [
        f"{key} is {given[key].value} and the proxy's {old_keys[key]}"
        for key in BATCH
        if key in given and given[key].value != old_keys[key]
    ]
    stages = given_stages(stored["data"]["stages"])
    if "data.stages" in given and given_stages(given["data.stages"].value) != stages:
        found["batch"].append("data.stages is not the proxy's, so steps have other sequences and text")
    for kind, sentences in found.items():
        if sentences and kind not in allowed:
            raise ConfigError(
                f"{sentences[0]}: Table 1 carries rates over widths only, at equal {kind}; make it equal, or say "
                f"transfer.allow={','.join([*allowed, kind])}"
            )
    return float(width)


def carried(stored: dict[str, Any], plain: Config, width: float, proxy: Path) -> dict[str, TransferredValue]:
    """The target's values by dotted key: the proxy's, changed where the width changes them."""
    flat, default = flatten(stored), flatten(as_mapping(plain))
    kept = [key for key in flat if key in KEYS or key.partition(".")[0] in SECTIONS]
    carried_too = ("data.", *(f"model.{name}" for name in CARRIED))
    kept += [key for key in flat if key.startswith(carried_too) and flat[key] != default[key]]
    values = {key: TransferredValue(flat[key], f"as {proxy}") for key in kept}
    return values | scaled(flat, width)


def scaled(flat: dict[str, Any], width: float) -> dict[str, TransferredValue]:
    """The values that change with the width: initial scales, rates by role, weight decay and ε."""
    values = {}
    for role in TRAINED:
        rule, key = RULES[role], f"optim.lr_scale.{role.value}"
        source = "Table 1" if rule.in_table else "not in Table 1"
        origin = f"{flat[key]:g}{times(rule.rate)} ({source})"
        values[key] = TransferredValue(product(flat[key], width**rule.rate), origin)
    for role in (Role.embedding, Role.hidden):
        rule, key = RULES[role], f"model.{RULES[role].initial.value}"
        origin = f"{flat[key]:g}{times(rule.variance, '√')} (Table 1: initial variance)"
        values[key] = TransferredValue(product(flat[key], width ** (rule.variance / 2)), origin)
    for key, power, why in (("weight_decay", 1, "rate × decay stays"), ("eps", -1, "gradients shrink")):
        old = flat[f"optim.{key}"]
        origin = f"{old:g}{times(power)}: {why} (not in Table 1)"
        values[f"optim.{key}"] = TransferredValue(product(old, width**power), origin)
    return values


def product(value: float, factor: float) -> float:
    """Rounded to 12 digits, so that people can read it and two transfers in a row are one."""
    return value if factor == 1 else float(f"{value * factor:.12g}")


def times(power: int, root: str = "") -> str:
    """` ÷ s` and its like."""
    return "" if power == 0 else f" {'×' if power > 0 else '÷'} {root}s"


def header(proxy: Path, stored: dict[str, Any], full: Config, width: float, allowed: list[str]) -> list[str]:
    """The comment above the configuration."""
    old, new = stored["model"], full.model
    lines = [
        f"{new.name} with the hyperparameters of {proxy} ({old['name']}), written by `longcat transfer`.",
        f"s = {new.hidden_size} / {old['hidden_size']} = {width:g}. Table 1 of the report: initial variance and",
        "learning rate of hidden matrices and head ÷ s, those of the embedding unchanged. What it leaves open:",
        "docs/decisions/2026-11-29-transfer.md. Each value says where it comes from; keys that are not here have their",
        "defaults: layout, checkpoints and logging are the target's own.",
    ]
    if allowed:
        lines.append(f"Allowed to differ, although no rule carries rates over it: {', '.join(allowed)}.")
    return lines


def write(path: Path, comment: list[str], model: str, values: dict[str, TransferredValue]) -> None:
    """Write the experiment: comment, model, values by section, each with its origin."""
    lines = ["# @package _global_", *(f"# {line}" for line in comment)]
    lines += ["defaults:", f"  - override /model: {model}"]
    values = {**values, "run.name": values.get("run.name", TransferredValue(path.stem, "this file's name"))}
    lines += nested(values)
    write_whole(path, "\n".join(lines) + "\n")


def nested(values: dict[str, TransferredValue]) -> Iterator[str]:
    """Dotted keys as lines of nested YAML, sections in the order of the configuration."""
    order = {key: number for number, key in enumerate(flatten(as_mapping(Config())))}
    opened: list[str] = []
    for key in sorted(values, key=lambda key: order.get(key, len(order))):
        *sections, name = key.split(".")
        for depth, section in enumerate(sections):
            if opened[: depth + 1] != sections[: depth + 1]:
                yield f"{'  ' * depth}{section}:"
                opened = sections[: depth + 1]
        opened = sections
        yield f"{'  ' * len(sections)}{name}: {as_text(values[key].value)}  # {values[key].origin}"


def as_text(value: Any) -> str:
    """A value as YAML on one line."""
    import yaml

    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return str(text).removesuffix("...\n").strip()
