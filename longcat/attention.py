"""Multi-head latent attention with variance alignment (sections 2 and 6 of the model's equations)."""

# B sequences, S positions, D width, H heads

from __future__ import annotations

import torch
from torch import Tensor, nn

from longcat.config import ModelConfig
from longcat.layers import Linear, RMSNorm
from longcat.ops.attention import causal_attention
from longcat.ops.elementwise import rotary


class LatentAttention(nn.Module):
    """MLA: queries, keys and values come from small normed latents; one rotary key serves all heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        d, heads = config.hidden_size, config.num_heads
        self.q_a_proj = Linear(d, config.q_lora_rank)
        self.q_a_layernorm = RMSNorm(config.q_lora_rank, config.latent_norm_eps)
        self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(d, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, config.latent_norm_eps)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, d)

    def forward(self, x: Tensor, angles: Tensor, documents: Tensor | None) -> Tensor:
        """x [B, S, D], angles [S, rotary/2] complex, documents [B, S] or None → [B, S, D]."""
        config = self.config
        batch, length, _ = x.shape
        nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))).view(batch, length, -1, nope + rope)
        latent, k_rope = self.kv_a_proj_with_mqa(x).split((config.kv_lora_rank, rope), -1)
        # α_kv scales what comes out of the latent; the shared rotary key is not scaled
        kv = self.kv_b_proj(self.kv_a_layernorm(latent) * config.latent_scale)
        k_nope, value = kv.view(batch, length, -1, nope + config.v_head_dim).split((nope, config.v_head_dim), -1)
        heads = k_nope.shape[2]
        q_nope, q_rope = q.split((nope, rope), -1)
        query = torch.cat((q_nope, rotary(q_rope, angles)), -1)
        k_rope = rotary(k_rope[:, :, None], angles).expand(-1, -1, heads, -1)
        key = torch.cat((k_nope, k_rope), -1)
        out = causal_attention(
            query.transpose(1, 2).contiguous(),
            key.transpose(1, 2).contiguous(),
            value.transpose(1, 2).contiguous(),
            config.softmax_scale * config.query_scale,  # α_q multiplies both parts of the query: so the scores
            documents,
        )
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]
