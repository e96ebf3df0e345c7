"""transformers' LongCat-Flash for a configuration of ours, and its tensors under our names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longcat.config import ModelConfig
from longcat.names import logical_tensors
from train.huggingface.rope_fields import write_rope


def peer_model(config: ModelConfig, attention: str) -> Any:
    """LongcatFlashForCausalLM of the same sizes; ``attention`` is its attention implementation."""
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    # The decorated configuration class hides its base class's arguments from type checkers.
    options: dict[str, Any] = {"use_cache": False, "attn_implementation": attention}
    return LongcatFlashForCausalLM(
        LongcatFlashConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            ffn_hidden_size=config.ffn_hidden_size,
            q_lora_rank=config.q_lora_rank,
            kv_lora_rank=config.kv_lora_rank,
            qk_nope_head_dim=config.qk_nope_head_dim,
            qk_rope_head_dim=config.qk_rope_head_dim,
            head_dim=config.qk_rope_head_dim,
            v_head_dim=config.v_head_dim,
            moe_topk=config.top_k,
            n_routed_experts=config.num_experts,
            zero_expert_num=config.num_zero_experts,
            expert_ffn_hidden_size=config.expert_hidden_size,
            routed_scaling_factor=float(config.routed_scaling_factor),
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters=write_rope(config, "transformers")["rope_parameters"],
            **options,
        )
    )


def peer_tensors(peer: nn.Module, config: ModelConfig, grads: bool = False) -> Iterator[tuple[str, Tensor]]:
    """(logical name, view) of the peer's values or gradients, without the unused rows of identity experts."""
    width = config.expert_hidden_size
    persistent = peer.state_dict().keys()
    stored: list[tuple[str, Tensor | None]] = list(peer.named_parameters())
    if grads:
        stored = [(name, parameter.grad) for name, parameter in peer.named_parameters()]
    else:
        stored += [(name, buffer) for name, buffer in peer.named_buffers() if name in persistent]
    for name, tensor in stored:
        stack, _, leaf = name.rpartition(".")
        if tensor is None:
            raise ValueError(f"{name} has no gradient in the transformers model")
        if not stack.endswith(".experts"):
            yield name, tensor
            continue
        for expert in range(config.num_experts):
            if leaf == "down_proj":
                yield f"{stack}.{expert}.down_proj.weight", tensor[expert]
            else:
                yield f"{stack}.{expert}.gate_proj.weight", tensor[expert, :width]
                yield f"{stack}.{expert}.up_proj.weight", tensor[expert, width:]


@torch.no_grad()
def copy_to_peer(model: nn.Module, peer: nn.Module, config: ModelConfig) -> None:
    """Copy our model's values to the peer, all but MTP's, so that both route every token alike."""
    targets = dict(peer_tensors(peer, config))
    for name, tensor in logical_tensors(model):
        if not name.startswith("model.mtp."):
            targets.pop(name).copy_(tensor)
    if targets:
        raise ValueError(f"our model lacks {sorted(targets)[:3]} ... of the transformers model")
