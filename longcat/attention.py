"""Multi-head latent attention with variance alignment (sections 2 and 6 of the model's equations)."""

# B sequences, D width, H heads, C query/key width, V value width, R latent rank
# S all positions, q positions of local queries, s local positions of the residual stream (longcat/interfaces.py)

from __future__ import annotations

import torch
from torch import Tensor

from longcat.config import ModelConfig
from longcat.documents import Documents
from longcat.interfaces import SequenceModule
from longcat.modules import Linear, RMSNorm, RotatedLinear
from longcat.ops import fusion
from longcat.ops.attention import causal_attention
from longcat.ops.recomputed import recomputable
from longcat.ops.rotation import expanded_keys, rotary
from longcat.recompute_values import Value


class LatentAttention(SequenceModule):
    """MLA: queries, keys and values are expanded from small normed latents; all heads share one rotary key."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d, heads = config.hidden_size, config.num_heads
        self.q_a_proj = Linear(d, config.q_lora_rank)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.latent_norm_eps)
        self.q_b_proj = RotatedLinear(config.q_lora_rank, heads * config.qk_head_dim, config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(d, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.latent_norm_eps)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, d)

    def forward(self, x: Tensor, angles: Tensor, documents: Documents | None) -> Tensor:
        """x [B, s, D], angles [S, rotary/2] complex, documents or None → [B, s, D].

        Ranks that share a sequence exchange the normed latents of keys and values, which are small. Each rank expands
        from them the heads whose weights it holds.
        """
        config, sequence = self.config, self.sequence
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((config.kv_lora_rank, config.qk_rope_head_dim), -1)
        # α_kv scales the latent; the shared rotary key is not scaled
        latent = self.kv_a_layernorm(latent) * config.latent_scale
        pending = sequence.start_keys(torch.cat((latent, k_rope), -1))  # overlaps with the queries
        query_latent = recomputable(Value.norms, self.q_a_layernorm, self.q_a_proj(x))
        turned = self.query_angles(angles) if fusion.is_on_gpu(x) else None
        query = recomputable(Value.expansion, self.q_b_proj, sequence.gather(query_latent), turned)
        out = self.attend(query, sequence.wait_keys(pending), angles, documents)
        return sequence.reduce(self.o_proj(out))

    def query_angles(self, angles: Tensor) -> Tensor:
        """angles [S, rotary/2] → those of the q local queries."""
        return torch.cat([angles[start:stop] for start, stop in self.sequence.ranges(angles.shape[0])])

    def attend(self, query: Tensor, latents: Tensor, angles: Tensor, documents: Documents | None) -> Tensor:
        """query [B, q, H·C] and latents [B, S, R + rotary] → the heads' outputs [B, q, H·V].

        On a GPU queries come rotated.
        """
        config = self.config
        nope, rope, width = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        ranges = self.sequence.ranges(latents.shape[1])
        latent, k_rope = latents.split((config.kv_lora_rank, rope), -1)
        expanded = recomputable(Value.expansion, self.kv_b_proj, latent)
        expanded = expanded.unflatten(-1, (-1, nope + width))
        query = query.unflatten(-1, (-1, nope + rope))
        if fusion.is_on_gpu(query):
            padded = max(nope + rope, width)
            key, value = recomputable(Value.expansion, expanded_keys, expanded, k_rope, angles, nope, padded)
        else:
            k_nope, value = expanded.split((nope, width), -1)
            query = recomputable(Value.expansion, _rotated_query, query, self.query_angles(angles), nope)
            key = recomputable(Value.expansion, _rotated_key, k_nope, k_rope, angles)
        out = causal_attention(
            query,
            key,
            value,
            config.softmax_scale * config.query_scale,  # α_q multiplies both parts of the query, hence the scores
            documents,
            ranges,
            width,
        )
        return out.flatten(2)


def _rotated_query(query: Tensor, angles: Tensor, nope: int) -> Tensor:
    """query [B, q, H, nope + rotary] with its last columns rotated."""
    q_nope, q_rope = query.tensor_split((nope,), -1)
    return torch.cat((q_nope, rotary(q_rope, angles)), -1)


def _rotated_key(k_nope: Tensor, k_rope: Tensor, angles: Tensor) -> Tensor:
    """k_nope [B, S, H, nope] and the rotary key of all heads [B, S, rotary] → [B, S, H, nope + rotary]."""
    rotated = rotary(k_rope[:, :, None], angles).expand(-1, -1, k_nope.shape[2], -1)
    return torch.cat((k_nope, rotated), -1)
