"""What is known about the programs that read an export: sizes that some of them cannot serve."""

from __future__ import annotations

from longcat.config import ModelConfig
from train.huggingface.rope_fields import other_amplitude

VLLM = "vLLM 0.32"
LATENT_WIDTHS = (320, 512, 576)  # kv_lora_rank + qk_rope_head_dim for which vLLM has an MLA kernel
IDENTITY_BLOCK = 256  # columns that vLLM's GPU kernel of identity experts computes at a time; a rest is left out


def serving_notes(model: ModelConfig, positions: int) -> list[str]:
    """A line for each program that cannot serve, or would serve wrongly, an export of ``model``.

    ``positions`` is the exported max_position_embeddings.
    """
    notes = []
    width = model.kv_lora_rank + model.qk_rope_head_dim
    if width not in LATENT_WIDTHS:
        notes.append(
            f"{VLLM} cannot serve it: kv_lora_rank + qk_rope_head_dim is {width}, its MLA kernels have "
            f"{', '.join(map(str, LATENT_WIDTHS))}"
        )
    if model.num_zero_experts and model.hidden_size % IDENTITY_BLOCK:
        notes.append(
            f"{VLLM} on a GPU would compute it wrongly: its kernel of identity experts needs a hidden_size that is a "
            f"multiple of {IDENTITY_BLOCK}, and it is {model.hidden_size}"
        )
    if model.num_mtp_layers > 1:
        notes.append(f"{VLLM} drafts with the first of its {model.num_mtp_layers} MTP layers only")
    scaling = model.rope_scaling
    if scaling.factor != 1 and other_amplitude(scaling) != scaling.amplitude:
        notes.append(
            f"programs that compute YaRN as DeepSeek's code does (vLLM, mlx-lm) would compute it otherwise: they "
            f"multiply queries and keys by {other_amplitude(scaling):.4f} where this model has {scaling.amplitude:.4f}"
        )
    if scaling.factor != 1 and not scaling.truncate:
        notes.append("mlx-lm 0.32 and vLLM would compute YaRN otherwise: they do not know rope_scaling.truncate=false")
    if scaling.factor != 1 and positions != scaling.factor * scaling.original_max_position_embeddings:
        implied = positions / scaling.original_max_position_embeddings
        notes.append(
            f"transformers 4 would compute YaRN otherwise: its factor is max_position_embeddings / "
            f"original_max_position_embeddings = {implied:g} where this model has {scaling.factor:g}"
        )
    return notes
