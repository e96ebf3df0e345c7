"""A small transformers model with random weights, and ours with the same values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.peer import peer_model, peer_tensors
from longcat.config import ModelConfig
from longcat.model import LongCat
from longcat.names import logical_tensors

BASE = ModelConfig(
    name="base",
    vocab_size=61,
    num_layers=2,
    hidden_size=32,
    num_heads=2,
    q_lora_rank=12,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    ffn_hidden_size=48,
    num_experts=6,
    num_zero_experts=3,
    top_k=3,
    expected_ffn_experts=2.0,
    expert_hidden_size=16,
    routed_scaling_factor=3.0,
    num_mtp_layers=0,
    rope_theta=1e6,
)


def plain_peer(config: ModelConfig) -> nn.Module:
    """The transformers model of the same sizes, with eager attention."""
    peer: nn.Module = peer_model(config, attention="eager")
    if config.top_k == 1:
        for name, module in peer.named_modules():
            if name.endswith(".experts"):
                module.register_forward_pre_hook(_second_choice_of_no_weight)
    return peer


def _second_choice_of_no_weight(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Choose the expert twice, once for 0: with K = 1 transformers 5.23 loses a dimension and fails."""
    hidden, indices, weights = inputs
    return hidden, indices.repeat(1, 2), torch.cat([weights, torch.zeros_like(weights)], dim=1)


@torch.no_grad()
def randomise(peer: nn.Module, config: ModelConfig, seed: int) -> None:
    """Values under which every term matters: gains off one, clear router scores, biases of the scores' size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, std: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) * std

    for name, parameter in peer.named_parameters():
        if parameter.dim() == 1:
            parameter.copy_(1 + normal(parameter, 0.2))
        elif "classifier" in name:
            parameter.copy_(normal(parameter, 1.5 / config.hidden_size**0.5))
        elif "embed" in name:
            parameter.copy_(normal(parameter, 1.0))
        else:
            parameter.copy_(normal(parameter, parameter.shape[-1] ** -0.5))
    for name, buffer in peer.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(normal(buffer, 1.0 / config.num_routed))


@torch.no_grad()
def our_model(peer: nn.Module, config: ModelConfig) -> LongCat:
    """Our model with the peer's values; fails if a name is left over on either side."""
    config.validate()
    model = LongCat(config)
    values = dict(peer_tensors(peer, config))
    for name, tensor in logical_tensors(model):
        if name.startswith("model.mtp."):
            tensor.fill_(0.1)  # must reach neither the logits nor the loss compared here
        else:
            assert tensor.shape == values[name].shape, name
            tensor.copy_(values.pop(name))
    assert not values, f"names that only the peer has: {sorted(values)}"
    return model
