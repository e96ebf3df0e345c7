"""The fields of config.json: which set a size, which must have one value, which change nothing; others are refused."""

from __future__ import annotations

from typing import Any

from longcat.errors import ConfigError

# Fields that set a size of the model: ours → theirs
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
NAMES = {ours: ours for ours in SAME} | RENAMED
REAL = ("routed_scaling_factor", "rms_norm_eps")  # the other ones are integers
MTP_LAYERS = "num_nextn_predict_layers"
ALIASES = {  # second names that other programs write
    "num_experts_per_tok": "moe_topk",
    "num_local_experts": "n_routed_experts",
    "intermediate_size": "ffn_hidden_size",
    "moe_intermediate_size": "expert_ffn_hidden_size",
    "mtp_num_layers": MTP_LAYERS,
}
READ = (  # by functions of their own
    "model_type", "architectures", "rope_theta", "rope_parameters", "rope_scaling", "max_position_embeddings",
    "quantization_config", "num_hidden_layers", "num_key_value_heads", "head_dim", "qk_head_dim", MTP_LAYERS,
)  # fmt: skip

# Fields that must have one of these values, since nothing else is computed. The first is what an export writes; None
# stands for null
REQUIRED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
    "mla_scale_q_lora": (True,),
    "mla_scale_kv_lora": (True,),
    "zero_expert_type": ("identity",),
    "attention_method": ("MLA", "mla"),
    "router_bias": (False,),
    "norm_topk_prob": (False,),
    "hidden_act": ("silu",),
    "attention_dropout": (0.0,),
    "hidden_dropout": (0.0,),
    "mlp_bias": (False,),
    "scoring_func": ("softmax", None),
    "topk_method": ("noaux_tc", None),  # the k best by score plus selection bias
    "n_group": (1, None),
    "topk_group": (1, None),
    "n_shared_experts": (0, None),
    "first_k_dense_replace": (0, None),
    "moe_layer_freq": (1, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1.0, None),
    "rope_interleave": (True, None),
    "nextn_use_scmoe": (False, None),
    "use_longcat_dsa": (False, None),
    "use_ngram_embedding": (False, None),
    "use_oe_embedding": (False, None),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
}
EXPORTED = (  # of REQUIRED, those that an export writes
    "attention_bias", "tie_word_embeddings", "mla_scale_q_lora", "mla_scale_kv_lora", "zero_expert_type",
    "attention_method", "router_bias", "hidden_act", "attention_dropout",
)  # fmt: skip

# Fields that change neither weights nor results here
WEIGHTS = "each tensor carries its own type"
TOKENS = "the tokenizer's files decide it"
RUNTIME = "it is about a program that runs the model"
TRAINING = "it is a setting of the training that made the weights"
IGNORED = {
    "auto_map": "it names Python code beside the weights, which is not run",
    "transformers_version": "it says who wrote the file",
    "torch_dtype": WEIGHTS,
    "dtype": WEIGHTS,
    "params_dtype": WEIGHTS,
    "rounter_params_dtype": "routers compute in float32 always",  # spelt so in the released files
    "router_params_dtype": "routers compute in float32 always",
    "router_dtype": "routers compute in float32 always",
    "bos_token_id": TOKENS,
    "eos_token_id": TOKENS,
    "pad_token_id": TOKENS,
    "tokenizer_class": TOKENS,
    "use_cache": RUNTIME,
    "ep_size": RUNTIME,
    "pretraining_tp": RUNTIME,
    "return_dict": RUNTIME,
    "output_attentions": RUNTIME,
    "output_hidden_states": RUNTIME,
    "output_router_logits": RUNTIME,
    "chunk_size_feed_forward": RUNTIME,
    "id2label": RUNTIME,
    "label2id": RUNTIME,
    "problem_type": RUNTIME,
    "initializer_range": TRAINING,
    "router_aux_loss_coef": TRAINING,
    "aux_loss_alpha": TRAINING,
    "seq_aux": TRAINING,
}
# transformers writes these with an underscore in front
IGNORED |= {f"_{name}": RUNTIME for name in ("name_or_path", "attn_implementation", "attn_implementation_autoset")}

# Beginnings of the names of fields that belong to relatives of the model
RELATIVES = {
    "ngram_": "n-gram embeddings (LongCat-Flash-Lite, LongCat-2.0)",
    "emb_": "n-gram embeddings (LongCat-Flash-Lite, LongCat-2.0)",
    "oe_": "n-gram embeddings (LongCat-2.0)",
    "use_ngram": "n-gram embeddings (LongCat-Flash-Lite, LongCat-2.0)",
    "use_oe": "n-gram embeddings (LongCat-2.0)",
    "index_": "sparse attention (LSA, LongCat-2.0)",
    "use_longcat_dsa": "sparse attention (LSA, LongCat-2.0)",
    "cli_": "sparse attention (LSA, LongCat-2.0)",
    "dsa_": "sparse attention (LSA, LongCat-2.0)",
    "mtp_": "another kind of MTP (LongCat-2.0)",
    "moe_impl": "the layers of LongCat-2.0",
    "moe_switch": "the layers of LongCat-2.0",
}
MODEL_TYPE, ARCHITECTURE = "longcat_flash", "LongcatFlashForCausalLM"
RELATED_KINDS = {  # model_type or architecture → what it has that this model has not
    "longcat_flash_ngram": "n-gram embeddings (LongCat-Flash-Lite)",
    "LongcatFlashNgramForCausalLM": "n-gram embeddings (LongCat-Flash-Lite)",
    "longcat_flash_pro": "n-gram embeddings and sparse attention (LongCat-2.0)",
    "longcat2": "n-gram embeddings and sparse attention (LongCat-2.0)",
    "longcat": "n-gram embeddings and sparse attention (LongCat-2.0)",
    "LongcatCausalLM": "n-gram embeddings and sparse attention (LongCat-2.0)",
    "LongcatForCausalLM": "n-gram embeddings and sparse attention (LongCat-2.0)",
    "LongcatNextForCausalLM": "n-gram embeddings and other modalities (LongCat-Next)",
}

# The compute budget K_e, for which config.json has no field: (n_routed_experts, zero_expert_num, moe_topk) → K_e
RELEASED_BUDGETS = {
    (512, 256, 12): 8.0,  # LongCat-Flash: the report's budget
    (256, 128, 12): 8.0,  # LongCat-Flash-Lite
    (768, 128, 12): 8.0,  # LongCat-2.0: 48B active on average
}


def check_kind(path: Any, tree: dict[str, Any]) -> None:
    """Raise ConfigError unless `model_type`, `architectures` or both name this model, and nothing else."""
    kind, architectures = tree.get("model_type"), tree.get("architectures") or []
    if not isinstance(architectures, list):
        raise ConfigError(f"{path}: architectures is {architectures!r}; it must be a list, correct it")
    if kind is None and not architectures:
        raise ConfigError(
            f"{path} has neither model_type nor architectures; if it is a LongCat-Flash model, add "
            f'"model_type": "{MODEL_TYPE}"'
        )
    named = [("architectures", name, ARCHITECTURE) for name in architectures]
    if kind is not None:
        named.append(("model_type", kind, MODEL_TYPE))
    for field, value, wanted in named:
        if isinstance(value, str) and value in RELATED_KINDS:
            raise ConfigError(f"{path}: {field} is {value!r}: a model with {RELATED_KINDS[value]}, not implemented")
        if value != wanted:
            raise ConfigError(f"{path}: {field} is {value!r}, not {wanted!r}; name the folder of a {MODEL_TYPE} model")


def check_fields(path: Any, tree: dict[str, Any]) -> None:
    """Raise ConfigError, with its name, for a field that is unknown or has a value that is not computed."""
    for name, value in tree.items():
        if name in REQUIRED:
            if not any(value == allowed for allowed in REQUIRED[name]):
                raise ConfigError(
                    f"{path}: {name} is {value!r}; only a model with {REQUIRED[name][0]!r} can be imported"
                    + _relative(name, ": that is {}, not implemented")
                )
        elif name not in NAMES.values() and name not in ALIASES and name not in READ and name not in IGNORED:
            if value is None:
                continue  # null = not set
            raise ConfigError(
                f"{path} has the field {name} ({value!r}), which "
                + (
                    _relative(name, "belongs to {}, not implemented")
                    or "is not known here, so the model may be another; remove it if it does not change the model"
                )
            )


def _relative(name: str, sentence: str) -> str:
    """``sentence`` about the relatives that have a field, or an empty text."""
    found = next((meaning for start, meaning in RELATIVES.items() if name.startswith(start)), None)
    return "" if found is None else sentence.format(found)


def resolve_aliases(path: Any, tree: dict[str, Any]) -> dict[str, Any]:
    """``tree`` with each second name replaced by the first; raises ConfigError where the two contradict."""
    resolved = dict(tree)
    for alias, name in ALIASES.items():
        value = resolved.pop(alias, None)
        if value is None:
            continue
        if resolved.get(name, value) != value:
            raise ConfigError(
                f"{path}: {name} is {resolved[name]!r} and {alias}, its second name, {value!r}; correct one"
            )
        resolved[name] = value
    return resolved
