"""The shortcut-connected layer (ScMoE, section 2 of the equations) and the dense MTP layer."""

# B sequences, s local positions, D width

from __future__ import annotations

import torch
from torch import Tensor, nn

from longcat.attention import LatentAttention
from longcat.config import ModelConfig
from longcat.documents import Documents
from longcat.modules import FeedForward, Linear, RMSNorm, add_and_norm
from longcat.moe import MoE, RoutingStatistics
from longcat.ops.elementwise import residual_sum
from longcat.ops.recomputed import recomputable
from longcat.recompute_values import Value


class ShortcutLayer(nn.Module):
    """Two attention blocks and two dense FFNs; the mixture of experts runs beside all but the first attention block."""

    def __init__(self, config: ModelConfig, balance_groups: int) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nn.ModuleList(RMSNorm(d, eps) for _ in range(2))
        self.post_attention_layernorm = nn.ModuleList(RMSNorm(d, eps) for _ in range(2))
        self.self_attn = nn.ModuleList(LatentAttention(config) for _ in range(2))
        self.mlps = nn.ModuleList(FeedForward(d, config.ffn_hidden_size) for _ in range(2))
        self.mlp = MoE(config, balance_groups)

    def forward(
        self, x: Tensor, angles: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, RoutingStatistics]:
        """x [B, s, D] → y [B, s, D] and the router's statistics.

        The order of these statements sets the overlap, in the forward and (reversed) in the backward: the computation
        between a start and its wait overlaps the communication. With the experts right after the first FFN, attention
        and the second FFN overlap combine; after attention 1, more computation overlaps dispatch and less combine.
        """
        attention, ffn, moe = self.self_attn, self.mlps, self.mlp
        normed = recomputable(Value.norms, self.input_layernorm[0], x)
        a, u = add_and_norm(self.post_attention_layernorm[0], x, attention[0](normed, angles, documents))
        pending = moe.dispatch(u.flatten(0, 1), documents)  # dispatch starts ...
        dense = ffn[0](u)
        moe.send_rows(pending)  # (on a GPU, rows are sent only here: the host had to wait for their number)
        if not moe.after_attention:
            pending = moe.compute(pending)  # ... ends, and combine starts
        b, normed = add_and_norm(self.input_layernorm[1], a, dense)
        c, v = add_and_norm(self.post_attention_layernorm[1], b, attention[1](normed, angles, documents))
        if moe.after_attention:
            pending = moe.compute(pending)
        dense = ffn[1](v)
        m, statistics = moe.combine(pending)
        return residual_sum(c, dense, m.view_as(c)), statistics


class NormBeforeProjection(nn.Module):
    """An RMSNorm under the released checkpoints' name `….m.weight`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.m = RMSNorm(width, eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)


class DenseBlock(nn.Module):
    """Holds the MTP layer's FFN under the released checkpoints' name `transformer_layer.mlp`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.mlp = FeedForward(config.hidden_size, config.ffn_hidden_size)


class MTPLayer(nn.Module):
    """Multi-token prediction: [norm(embedding of the next token), norm(hidden)] → one dense layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = NormBeforeProjection(d, eps)
        self.hnorm = NormBeforeProjection(d, eps)
        self.eh_proj = Linear(2 * d, d)
        self.input_layernorm = RMSNorm(d, eps)
        self.self_attn = LatentAttention(config)
        self.post_attention_layernorm = RMSNorm(d, eps)
        self.transformer_layer = DenseBlock(config)

    def forward(self, hidden: Tensor, embedded: Tensor, angles: Tensor, documents: Documents | None) -> Tensor:
        """hidden, embedded [B, s, D] → [B, s, D], before the final norm of the MTP head."""
        x = self.eh_proj(recomputable(Value.norms, self._normed, embedded, hidden))
        attended = self.self_attn(recomputable(Value.norms, self.input_layernorm, x), angles, documents)
        a, normed = add_and_norm(self.post_attention_layernorm, x, attended)
        return a + self.transformer_layer.mlp(normed)

    def _normed(self, embedded: Tensor, hidden: Tensor) -> Tensor:
        return torch.cat((self.enorm(embedded), self.hnorm(hidden)), -1)
