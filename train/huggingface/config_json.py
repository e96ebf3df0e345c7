"""config.json and generation_config.json: a model's sizes to Hugging Face's field names and back."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from longcat.json_text import dumps

CONFIG, GENERATION, OURS = "config.json", "generation_config.json", "longcat.json"
SAME = (
    "vocab_size", "hidden_size", "num_layers", "ffn_hidden_size", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "routed_scaling_factor", "rms_norm_eps",
)  # fmt: skip
RENAMED = {
    "num_heads": "num_attention_heads",
    "top_k": "moe_topk",
    "num_experts": "n_routed_experts",
    "num_zero_experts": "zero_expert_num",
    "expert_hidden_size": "expert_ffn_hidden_size",
}
NAMES = dict.fromkeys(SAME) | RENAMED  # ours → theirs, None = the same
FLOATS = ("routed_scaling_factor", "rms_norm_eps")  # the other ones are integers
REQUIRED = {  # what this model computes; with another value config.json is of another model
    "attention_bias": False,
    "tie_word_embeddings": False,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "zero_expert_type": "identity",
    "attention_method": "MLA",
    "router_bias": False,
    "norm_topk_prob": False,
    "hidden_act": "silu",
}
THEIR_THETA = 1e7  # rope_theta where config.json leaves it out
THEIR_LATENT_EPS = 1e-6  # of the latent norms, fixed in their code


def to_config(model: ModelConfig, layout: str, dtype: str, end: int, positions: int) -> dict[str, Any]:
    """The contents of config.json. ``end`` is the token that ends a document and also starts and pads."""
    rope: dict[str, Any] = {"rope_theta": float(model.rope_theta)}
    if layout == "transformers":
        rope = {"rope_parameters": {"rope_type": "default", **rope}}
    return {
        "architectures": ["LongcatFlashForCausalLM"],
        "model_type": "longcat_flash",
        **{theirs or ours: getattr(model, ours) for ours, theirs in NAMES.items()},
        "routed_scaling_factor": float(model.routed_scaling_factor),
        "num_hidden_layers": 2 * model.num_layers,  # each layer has two attention blocks, and so two caches
        "num_key_value_heads": model.num_heads,
        "num_nextn_predict_layers": model.num_mtp_layers,
        "head_dim": model.qk_rope_head_dim,
        "qk_head_dim": model.qk_head_dim,
        **{name: value for name, value in REQUIRED.items() if name != "norm_topk_prob"},
        **rope,
        "attention_dropout": 0.0,
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


def from_folder(folder: Path, num_mtp_layers: int) -> dict[str, Any]:
    """Fields of ModelConfig, and `positions`, from a folder's config.json and, if it exists, longcat.json.

    Raises:
        ConfigError: config.json is missing, damaged, or of a model that is not this one.
    """
    path = folder / CONFIG
    try:
        tree = json.loads(path.read_text())
        if tree.get("model_type") != "longcat_flash":
            raise ConfigError(f"{path}: model_type is {tree.get('model_type')!r}, not 'longcat_flash'; name another")
        found = {
            ours: number(path, theirs or ours, tree[theirs or ours], ours in FLOATS) for ours, theirs in NAMES.items()
        }
    except KeyError as error:
        raise ConfigError(f"{path} has no {error}; complete it") from error
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} cannot be read ({error}); source= must be a Hugging Face folder") from error
    for name, needed in REQUIRED.items():
        if tree.get(name, needed) != needed:
            raise ConfigError(f"{path}: {name} is {tree[name]!r}; only a model with {needed!r} can be imported")
    found["rope_theta"] = rope_theta(path, tree)
    found["num_mtp_layers"] = num_mtp_layers
    found["name"] = "imported"
    if found["num_experts"] < 1 or found["num_zero_experts"] < 0:
        raise ConfigError(f"{path}: n_routed_experts must be at least 1 and zero_expert_num not negative; correct them")
    # config.json has no compute budget: by default FFN experts get their share of the choices (8 of 12 at 560B)
    share = found["num_experts"] / (found["num_experts"] + found["num_zero_experts"])
    found["expected_ffn_experts"] = round(found["top_k"] * share, 6)
    found |= {name: value for name, value in ours_of(folder).items() if name not in (*NAMES, "num_mtp_layers")}
    positions = tree.get("max_position_embeddings")
    found["positions"] = 0 if positions is None else number(path, "max_position_embeddings", positions)
    return found


def number(path: Path, name: str, value: Any, real: bool = False) -> Any:
    """``value`` of a field of config.json, if it is an integer, or with ``real`` any finite number.

    Raises:
        ConfigError: it is not.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if real and isinstance(value, float) and math.isfinite(value):
        return value
    raise ConfigError(f"{path}: {name} is {value!r}; it must be {'a number' if real else 'a whole number'}, correct it")


def rope_theta(path: Path, tree: dict[str, Any]) -> float:
    """The base of the rotary frequencies, from either of its two fields."""
    name = "rope_parameters" if tree.get("rope_parameters") else "rope_scaling"
    parameters = tree.get(name) or {}
    if not isinstance(parameters, dict):
        raise ConfigError(f"{path}: {name} is {parameters!r}; it must be an object or null, correct it")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind != "default":
        raise ConfigError(f"{path}: rotary positions are scaled ({kind}); only unscaled ones can be imported")
    theta = parameters.get("rope_theta", tree.get("rope_theta", THEIR_THETA))
    return float(number(path, "rope_theta", theta, real=True))


def ours_of(folder: Path) -> dict[str, Any]:
    """The model in longcat.json, which our exports have beside config.json; empty without that file."""
    try:
        model = dict(json.loads((folder / OURS).read_text())["model"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / OURS} cannot be read ({error}); restore it or remove it") from error
    return {name: value for name, value in model.items() if name in {field.name for field in fields(ModelConfig)}}


def texts(model: ModelConfig, layout: str, dtype: str, end: int, positions: int, counters: Any) -> dict[str, str]:
    """File name → text of an export's configuration files."""
    trees = {
        CONFIG: to_config(model, layout, dtype, end, positions),
        GENERATION: {**special_tokens(end), "do_sample": False},
        OURS: {"model": asdict(model), "layout": layout, "counters": counters},
    }
    return {name: dumps(tree, indent=2) + "\n" for name, tree in trees.items()}
