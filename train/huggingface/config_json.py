"""config.json and generation_config.json: a model's sizes to Hugging Face's field names and back."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from longcat.json_text import dumps
from train.huggingface.fields import (
    ARCHITECTURE,
    EXPORTED,
    MODEL_TYPE,
    MTP_LAYERS,
    NAMES,
    REAL,
    RELEASED_BUDGETS,
    REQUIRED,
    check_fields,
    check_kind,
    resolve_aliases,
)
from train.huggingface.rope_fields import read_rope, write_rope
from train.huggingface.values import number, read_json

CONFIG, GENERATION = "config.json", "generation_config.json"
THEIR_LATENT_EPS = 1e-6  # of the latent norms, fixed in their code
FOLDER = "source= must be a Hugging Face folder"


def to_config(model: ModelConfig, layout: str, dtype: str, end: int, positions: int) -> dict[str, Any]:
    """The contents of config.json. ``end`` is the token that ends a document and also starts and pads.

    `num_hidden_layers` is left out: it is 2·L in some released files and L in others, a serving engine would build that
    many layers, and all readers that were tried take `num_layers`.
    """
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **{theirs: getattr(model, ours) for ours, theirs in NAMES.items()},
        "routed_scaling_factor": float(model.routed_scaling_factor),
        "num_key_value_heads": model.num_heads,
        MTP_LAYERS: model.num_mtp_layers,
        "head_dim": model.qk_rope_head_dim,
        "qk_head_dim": model.qk_head_dim,
        **{name: REQUIRED[name][0] for name in EXPORTED},
        **write_rope(model, layout),
        "initializer_range": model.hidden_std,
        "max_position_embeddings": positions,
        "use_cache": True,
        **special_tokens(end),
        "torch_dtype" if layout == "released" else "dtype": dtype,
    }


def check_expressible(model: ModelConfig) -> None:
    """Raise ConfigError for a model that config.json cannot describe; its readers would compute it wrongly."""
    if model.latent_norm_eps != THEIR_LATENT_EPS:
        raise ConfigError(
            f"model.latent_norm_eps={model.latent_norm_eps} cannot be exported: config.json has no field for it, and "
            f"its readers use {THEIR_LATENT_EPS}; only a model trained with that can be exported"
        )


def special_tokens(end: int) -> dict[str, int]:
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}


def read_config(folder: Path, num_mtp_layers: int, overridden: Collection[str] = ()) -> dict[str, Any]:
    """Fields of ModelConfig, and `positions`, from a folder's config.json.

    `expected_ffn_experts` is among them only where it is known: for the sizes of a released model, and without identity
    experts. ``num_mtp_layers`` is the number in the weights; ``overridden`` are the keys of the configuration that
    the user has set.

    Raises:
        ConfigError: config.json is missing, damaged, or of a model that is not this one; the message names the field.
    """
    path = folder / CONFIG
    tree = read_json(path, FOLDER)
    check_kind(path, tree)
    check_fields(path, tree)
    tree = resolve_aliases(path, tree)
    try:
        found = {ours: number(path, theirs, tree[theirs], ours in REAL) for ours, theirs in NAMES.items()}
    except KeyError as error:
        raise ConfigError(f"{path} has no {error}; complete it") from error
    if found["num_experts"] < 1 or found["num_zero_experts"] < 0:
        raise ConfigError(f"{path}: n_routed_experts must be at least 1 and zero_expert_num not negative; correct them")
    check_derived(path, tree, found)
    found["rope_theta"], found["rope_scaling"] = read_rope(path, tree)
    found["num_mtp_layers"] = num_mtp_layers
    check_mtp_layers(path, tree.get(MTP_LAYERS), num_mtp_layers, overridden)
    found["name"] = "imported"
    sizes = (found["num_experts"], found["num_zero_experts"], found["top_k"])
    if found["num_zero_experts"] == 0:
        found["expected_ffn_experts"] = float(found["top_k"])
    elif sizes in RELEASED_BUDGETS:
        found["expected_ffn_experts"] = RELEASED_BUDGETS[sizes]
    positions = tree.get("max_position_embeddings")
    found["positions"] = 0 if positions is None else number(path, "max_position_embeddings", positions)
    if found["positions"] < 0:
        raise ConfigError(f"{path}: max_position_embeddings is {positions}; it must not be negative, correct it")
    return found


def check_derived(path: Path, tree: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise ConfigError for a field that the sizes determine and that has another value.

    `num_hidden_layers` counts attention blocks in some files and layers in others; `head_dim` is the rotary width in
    transformers' files and the whole query in others.
    """
    whole = found["qk_nope_head_dim"] + found["qk_rope_head_dim"]
    allowed = {
        "num_hidden_layers": (found["num_layers"], 2 * found["num_layers"]),
        "num_key_value_heads": (found["num_heads"],),
        "head_dim": (found["qk_rope_head_dim"], whole),
        "qk_head_dim": (whole,),
    }
    for name, values in allowed.items():
        value = tree.get(name)
        if value is not None and (isinstance(value, bool) or value not in values):
            raise ConfigError(
                f"{path}: {name} is {value!r}; the other sizes make it {' or '.join(map(str, values))}, correct it"
            )


def check_mtp_layers(path: Path, stated: Any, found: int, overridden: Collection[str]) -> None:
    """Raise ConfigError where config.json and weights have different numbers of MTP layers.

    Weights without any are accepted: transformers leaves MTP out of what it saves, and keeps the number.
    """
    if stated is None or "model.num_mtp_layers" in overridden:
        return
    if number(path, MTP_LAYERS, stated) != found and found:
        raise ConfigError(
            f"{path}: {MTP_LAYERS} is {stated} and the weights have {found} MTP layers; say which with "
            f"model.num_mtp_layers"
        )


def texts(model: ModelConfig, layout: str, dtype: str, end: int, positions: int) -> dict[str, str]:
    """File name → text of an export's configuration files."""
    trees = {
        CONFIG: to_config(model, layout, dtype, end, positions),
        GENERATION: {**special_tokens(end), "do_sample": False},
    }
    return {name: dumps(tree, indent=2) + "\n" for name, tree in trees.items()}
