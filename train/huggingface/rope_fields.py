"""Rotary positions in config.json: base and YaRN, from and to the fields of both generations of transformers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from longcat.rope import RopeScaling
from train.huggingface.values import number

THETA = 1e7  # rope_theta where config.json leaves it out
OBJECTS = ("rope_parameters", "rope_scaling")  # transformers from 5 on; before, and the released files
KINDS = ("type", "rope_type")
REAL = ("factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
LENGTH = "original_max_position_embeddings"


def read_rope(path: Path, tree: dict[str, Any]) -> tuple[float, RopeScaling]:
    """(θ, scaling) of a config.json.

    Raises:
        ConfigError: an unknown kind of scaling, an unknown or missing parameter, or fields that contradict each other.
    """
    found = {name: tree[name] for name in OBJECTS if tree.get(name) not in (None, {})}
    for name, parameters in found.items():
        if not isinstance(parameters, dict):
            raise ConfigError(f"{path}: {name} is {parameters!r}; it must be an object or null, correct it")
    thetas = {f"{name}.rope_theta": part["rope_theta"] for name, part in found.items() if "rope_theta" in part}
    if tree.get("rope_theta") is not None:
        thetas["rope_theta"] = tree["rope_theta"]
    values = {name: float(number(path, name, value, real=True)) for name, value in thetas.items()}
    scalings = {name: read_scaling(path, name, parameters) for name, parameters in found.items()}
    for kind, given in (("", values), ("the scaling of ", scalings)):
        (first, value), *others = given.items() or [("", None)]
        for other, another in others:
            if another != value:
                raise ConfigError(
                    f"{path}: {kind}{first} and {other} contradict each other ({value} and {another}); correct one"
                )
    return next(iter(values.values()), THETA), next(iter(scalings.values()), RopeScaling())


def read_scaling(path: Path, name: str, parameters: dict[str, Any]) -> RopeScaling:
    """The scaling of one object of rotary parameters."""
    kinds = {key: parameters[key] for key in KINDS if parameters.get(key) is not None}
    rest = {key: value for key, value in parameters.items() if key not in (*KINDS, "rope_theta") and value is not None}
    if len(set(map(str, kinds.values()))) > 1:
        raise ConfigError(f"{path}: {name} has type and rope_type, which contradict each other; correct one")
    if not kinds and rest:
        raise ConfigError(f"{path}: {name} has no type ({parameters!r}); add it, for instance yarn")
    kind = next(iter(kinds.values()), "default")
    if kind not in ("default", "yarn", "deepseek_yarn"):
        raise ConfigError(
            f"{path}: {name} scales rotary positions by {kind!r}; only yarn, deepseek_yarn and default are computed"
        )
    if rest.pop("partial_rotary_factor", 1) != 1:
        raise ConfigError(f"{path}: {name}.partial_rotary_factor is not 1; only that is computed")
    known = () if kind == "default" else (*REAL, LENGTH, "truncate")
    if unknown := sorted(rest.keys() - set(known)):
        raise ConfigError(f"{path}: {name}.{unknown[0]} is not known for rotary positions of type {kind}; remove it")
    if kind == "default":
        return RopeScaling()
    for key in ("factor", LENGTH):
        if key not in rest:
            raise ConfigError(f"{path}: {name} is of type {kind} and has no {key}; add it")
    truncate = rest.pop("truncate", True)
    if not isinstance(truncate, bool):
        raise ConfigError(f"{path}: {name}.truncate is {truncate!r}; it must be true or false, correct it")
    values = {key: number(path, f"{name}.{key}", value, real=key in REAL) for key, value in rest.items()}
    if values.get("attention_factor") == 0:
        raise ConfigError(f"{path}: {name}.attention_factor is 0, which makes all positions alike; correct it")
    values = {key: float(value) if key in REAL else value for key, value in values.items()}
    scaling = RopeScaling(**values, truncate=truncate)
    if scaling.factor < 1:
        raise ConfigError(f"{path}: {name}.factor is {scaling.factor}; it must be at least 1, correct it")
    return scaling if kind == "yarn" else as_yarn(scaling, "mscale" in values)


def as_yarn(scaling: RopeScaling, has_mscale: bool) -> RopeScaling:
    """A `deepseek_yarn` in the terms of `yarn`, which takes mscale and mscale_all_dim into account only together.

    DeepSeek's code multiplies rotated queries and keys by g(mscale) / g(mscale_all_dim) always, where mscale is 1 and
    mscale_all_dim 0 if they are not given.
    """
    if scaling.attention_factor:
        return scaling
    mscale = scaling.mscale if has_mscale else 1.0
    wanted = scaling.gain(mscale) / scaling.gain(scaling.mscale_all_dim)
    scaling.mscale = mscale if scaling.mscale_all_dim else 0.0
    if scaling.amplitude != wanted:
        scaling.mscale, scaling.attention_factor = 0.0, wanted
    return scaling


def write_rope(model: ModelConfig, layout: str) -> dict[str, Any]:
    """The fields of config.json. The base stands at the top level in both layouts, where every reader looks for it."""
    theta, scaling = float(model.rope_theta), model.rope_scaling
    parameters: dict[str, Any] = {"rope_type": "default"}
    if scaling.factor != 1:
        given = {key: value for key, value in asdict(scaling).items() if value or key == "truncate"}
        if scaling.truncate:
            del given["truncate"]  # the default, which older readers do not know
        parameters = {"rope_type": "yarn", **given}
    if layout == "transformers":
        return {"rope_theta": theta, "rope_parameters": {**parameters, "rope_theta": theta}}
    if scaling.factor == 1:
        return {"rope_theta": theta}
    return {"rope_theta": theta, "rope_scaling": {"type": "yarn", **parameters}}


def other_amplitude(scaling: RopeScaling) -> float:
    """The amplitude that programs with DeepSeek's formula compute from the exported fields."""
    return scaling.gain(scaling.mscale or 1.0) / scaling.gain(scaling.mscale_all_dim)
