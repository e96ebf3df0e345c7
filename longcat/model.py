"""The LongCat-Flash language model: embedding, shortcut-connected layers, head, MTP, and all losses as sums."""

# B sequences, S positions, T = B·S tokens, D width, V vocabulary, L layers, N + Z routed experts

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from longcat.layer import PredictionLayer, ShortcutLayer
from longcat.layers import Embedding, Linear, RMSNorm
from longcat.moe import Router, RoutingStatistics
from longcat.ops.cross_entropy import linear_cross_entropy
from longcat.ops.elementwise import rotary_angles


class Losses(NamedTuple):
    """The losses of one micro-batch. Sums, never means: who knows the global batch divides, once."""

    lm: Tensor  # Σ over valid tokens of -log p(label)
    mtp: Tensor  # the same for the MTP layers, over `mtp_valid` tokens; 0 while MTP is off
    balance: Tensor  # Σ over layers of the device-level balance loss (section 5), a mean over this micro-batch
    hidden_z: Tensor  # Σ over tokens of (log Σ_i exp |z_i|)², z before the final norm (section 9)
    token_losses: Tensor  # [B, S] -log p(label), 0 where invalid; carries no gradient
    hidden_norm: Tensor  # Σ over tokens of ‖z‖₂; carries no gradient
    counts: Tensor  # [L, N + Z] int64 selections
    balance_slope: Tensor  # [L, N + Z] see RoutingStatistics
    ffn_experts: Tensor  # [L, B, S] FFN experts of each token


class Prediction(nn.Module):
    """The MTP part: its layers and its final norm; embedding and head are the model's own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(PredictionLayer(config) for _ in range(config.num_mtp_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LongCat(nn.Module):
    """A LongCat-Flash model without values (see `longcat.init`).

    ``balance_groups`` is D of the balance loss: a setting of the model, never read from the layout.
    """

    def __init__(self, config: ModelConfig, balance_groups: int = 1) -> None:
        super().__init__()
        config.validate()
        if balance_groups < 1 or config.num_experts % balance_groups:
            raise ConfigError(
                f"balance.num_groups={balance_groups} does not divide model.num_experts={config.num_experts}; "
                f"use a divisor of it"
            )
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict(
            {str(number): ShortcutLayer(config, balance_groups) for number in range(config.num_layers)}
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.mtp = Prediction(config) if config.num_mtp_layers else None

    def shortcut_layers(self) -> list[ShortcutLayer]:
        """The layers that live here, in the order of their global numbers."""
        return [layer for layer in self.layers.values() if isinstance(layer, ShortcutLayer)]

    def routers(self) -> list[Router]:
        return [layer.mlp.router for layer in self.shortcut_layers()]

    def trunk(self, tokens: Tensor, documents: Tensor | None) -> tuple[Tensor, list[RoutingStatistics]]:
        """tokens [B, S] → z [B, S, D], the hidden states before the final norm, and each layer's statistics."""
        x = self.embed_tokens(tokens)
        angles = self.angles(tokens)
        statistics = []
        for layer in self.shortcut_layers():
            x, layer_statistics = layer(x, angles, documents)
            statistics.append(layer_statistics)
        return x, statistics

    def angles(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return rotary_angles(positions, self.config.qk_rope_head_dim, self.config.rope_theta)

    def logits(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """tokens [B, S] → next-token logits [B, S, V]."""
        z, _ = self.trunk(tokens, documents)
        return self.lm_head(self.norm(z))  # type: ignore[no-any-return]

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        valid: Tensor,
        documents: Tensor | None = None,
        mtp: bool = True,
    ) -> Losses:
        """Losses of tokens, labels [B, S] int64 (labels[t] = tokens[t+1]), valid [B, S] bool, documents [B, S]."""
        z, statistics = self.trunk(tokens, documents)
        hidden = self.norm(z)
        lm, token_losses = linear_cross_entropy(
            hidden.flatten(0, 1), self.lm_head.weight, labels.flatten(), valid.flatten()
        )
        extra = z.new_zeros((), dtype=torch.float32)
        if mtp and self.mtp is not None:
            extra = self._predict_further(hidden, labels, valid, documents)
        return Losses(
            lm=lm,
            mtp=extra,
            balance=torch.stack([s.balance for s in statistics]).sum(),
            hidden_z=hidden_z(z),
            token_losses=token_losses.view_as(labels),
            hidden_norm=torch.linalg.vector_norm(z.detach().float(), dim=-1).sum(),
            counts=torch.stack([s.counts for s in statistics]),
            balance_slope=torch.stack([s.balance_slope.detach() for s in statistics]),
            ffn_experts=torch.stack([s.ffn_experts for s in statistics]).view(-1, *tokens.shape),
        )

    def _predict_further(self, hidden: Tensor, labels: Tensor, valid: Tensor, documents: Tensor | None) -> Tensor:
        """Σ of the MTP layers' cross-entropies; layer k predicts the token 2 + k places on.

        The hidden states enter after the final norm: the report does not say where, so this is the project's choice.
        """
        assert self.mtp is not None
        total = hidden.new_zeros((), dtype=torch.float32)
        angles = self.angles(labels)
        next_tokens = labels
        for depth, layer in enumerate(self.mtp.layers, start=1):
            hidden = self.mtp.norm(layer(hidden, self.embed_tokens(next_tokens), angles, documents))
            next_tokens = next_tokens.roll(-1, 1)
            loss, _ = linear_cross_entropy(
                hidden.flatten(0, 1),
                self.lm_head.weight,
                next_tokens.flatten(),
                mtp_valid(valid, documents, depth).flatten(),
            )
            total = total + loss
        return total


def mtp_valid(valid: Tensor, documents: Tensor | None, depth: int) -> Tensor:
    """Where MTP layer ``depth`` (from 1) has a label: inside the sample and, with document masks, the document."""
    shifted = valid.roll(-depth, 1).clone()
    shifted[:, -depth:] = False
    if documents is not None:
        shifted &= documents == documents.roll(-depth, 1)
    return shifted


def hidden_z(z: Tensor) -> Tensor:
    """Σ_t (log Σ_i exp |z_t,i|)² over tokens, in float32 (section 9; λ/T is multiplied where T is known)."""
    return torch.logsumexp(z.float().abs(), -1).square().sum()
