"""The LongCat-Flash language model: embedding, shortcut-connected layers, head, MTP, and all losses as sums."""

# B sequences, D width, V vocabulary, L layers that are here, N + Z routed experts
# S all positions, q positions with queries here, s positions held here (longcat/interfaces.py)

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from longcat.interfaces import SequenceModule, VocabularyModule, local_tensor
from longcat.layer import MTPLayer, ShortcutLayer
from longcat.layers import Embedding, Linear, RMSNorm
from longcat.moe import Router, RoutingStatistics
from longcat.ops.elementwise import rotary_angles


class Losses(NamedTuple):
    """The losses of one micro-batch, as far as they arise here. Sums, never means: who knows the global batch divides.

    Over the processes that share a micro-batch `balance`, `hidden_z` and `hidden_norm` add up to the whole; `lm`,
    `mtp` and `token_losses` are the same on those that share a vocabulary. A part of the model without head has zeros.
    """

    lm: Tensor  # Σ over valid tokens of -log p(label)
    mtp: Tensor  # the same for the MTP layers, over `mtp_valid` tokens; 0 while MTP is off
    balance: Tensor  # Σ over layers of the device-level balance loss (section 5), a mean over this micro-batch
    hidden_z: Tensor  # Σ over tokens of (log Σ_i exp |z_i|)², z before the final norm (section 9)
    token_losses: Tensor  # [B, q] -log p(label), 0 where invalid; carries no gradient
    hidden_norm: Tensor  # Σ over tokens of ‖z‖₂; carries no gradient
    counts: Tensor  # [L, N + Z] int64 selections of the tokens here
    balance_slope: Tensor  # [L, N + Z] see RoutingStatistics
    ffn_experts: Tensor  # [L, B, s] FFN experts of each token
    hidden: Tensor  # [B, s, D] the residual stream after the last layer here


@dataclass(frozen=True)
class ModelPart:
    """Which part of a model is here: layers first ... last - 1, and what stands before and behind them."""

    first: int
    last: int
    embedding: bool
    head: bool  # final norm, head and MTP; MTP needs the embedding too, and gets one of its own where it is not here


class MTP(nn.Module):
    """The MTP part: its layers and its final norm; embedding and head are the model's own."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MTPLayer(config) for _ in range(config.num_mtp_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LongCat(SequenceModule, VocabularyModule):
    """A LongCat-Flash model without values (see `longcat.init`).

    ``balance_groups`` is D of the balance loss: a setting of the model, never read from the layout. ``part`` is
    what of the model is here; None means all.
    """

    def __init__(self, config: ModelConfig, balance_groups: int = 1, part: ModelPart | None = None) -> None:
        super().__init__()
        config.validate()
        if balance_groups < 1 or config.num_experts % balance_groups:
            raise ConfigError(
                f"balance.num_groups={balance_groups} does not divide model.num_experts={config.num_experts}; "
                f"use a divisor of it"
            )
        self.config = config
        self.part = part = part or ModelPart(0, config.num_layers, embedding=True, head=True)
        predicts = part.head and config.num_mtp_layers > 0
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size) if part.embedding or predicts else None
        self.layers = nn.ModuleDict(
            {str(number): ShortcutLayer(config, balance_groups) for number in range(part.first, part.last)}
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if part.head else None
        self.lm_head = Linear(config.hidden_size, config.vocab_size) if part.head else None
        self.mtp = MTP(config) if predicts else None

    def shortcut_layers(self) -> list[ShortcutLayer]:
        """The layers that live here, in the order of their global numbers."""
        return [layer for layer in self.layers.values() if isinstance(layer, ShortcutLayer)]

    def routers(self) -> list[Router]:
        return [layer.mlp.router for layer in self.shortcut_layers()]

    def trunk(
        self, tokens: Tensor, documents: Tensor | None, hidden: Tensor | None = None
    ) -> tuple[Tensor, list[RoutingStatistics]]:
        """tokens [B, S], or what the layer before the first one here gave → [B, s, D], and each layer's statistics."""
        x = hidden
        if x is None:
            assert self.embed_tokens is not None
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
        """tokens [B, S] → next-token logits [B, S, V], of a model that is all here."""
        assert self.norm is not None and self.lm_head is not None
        z, _ = self.trunk(tokens, documents)
        return self.lm_head(self.norm(z))

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        valid: Tensor,
        documents: Tensor | None = None,
        mtp: bool = True,
        hidden: Tensor | None = None,
    ) -> Losses:
        """Losses of tokens, labels [B, S] int64 (labels[t] = tokens[t+1]), valid [B, S] bool, documents [B, S].

        All ids are those of the whole sequence on every process. ``hidden`` [B, s, D] is what a part without the
        embedding goes on from.
        """
        z, statistics = self.trunk(tokens, documents, hidden)
        nothing = z.new_zeros((), dtype=torch.float32)
        lm, extra, further, norm, token_losses = nothing, nothing, nothing, nothing, nothing
        if self.norm is not None:
            normed = self.norm(z)
            lm, token_losses = self._cross_entropy(normed, labels, valid)
            if mtp and self.mtp is not None:
                extra = self._predict_further(normed, labels, valid, documents)
            further = hidden_z(z)
            norm = torch.linalg.vector_norm(z.detach().float(), dim=-1).sum()
        return Losses(
            lm=lm,
            mtp=extra,
            balance=torch.stack([s.balance for s in statistics]).sum(),
            hidden_z=further,
            token_losses=token_losses,
            hidden_norm=norm,
            counts=torch.stack([s.counts for s in statistics]),
            balance_slope=torch.stack([s.balance_slope.detach() for s in statistics]),
            ffn_experts=torch.stack([s.ffn_experts for s in statistics]).view(-1, *z.shape[:2]),
            hidden=z,
        )

    def _cross_entropy(self, normed: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """normed [B, s, D], labels, valid [B, S] → Σ of the losses at the q positions, and each [B, q]."""
        assert self.lm_head is not None
        labels, valid = self.sequence.select(labels), self.sequence.select(valid)
        rows = self.sequence.gather(normed).flatten(0, 1)
        weight = local_tensor(self.lm_head.weight)
        total, each = self.vocabulary.cross_entropy(rows, weight, labels.flatten(), valid.flatten())
        return total, each.view_as(labels)

    def _predict_further(self, hidden: Tensor, labels: Tensor, valid: Tensor, documents: Tensor | None) -> Tensor:
        """Σ of the MTP layers' cross-entropies; layer k predicts the token 2 + k places on.

        The hidden states enter after the final norm: the report does not say where, so this is the project's choice.
        """
        assert self.mtp is not None and self.embed_tokens is not None
        total = hidden.new_zeros((), dtype=torch.float32)
        angles = self.angles(labels)
        next_tokens = labels
        for depth, layer in enumerate(self.mtp.layers, start=1):
            hidden = self.mtp.norm(layer(hidden, self.embed_tokens(next_tokens), angles, documents))
            next_tokens = next_tokens.roll(-1, 1)  # before they are spread: a shard knows not its neighbour's first
            loss, _ = self._cross_entropy(hidden, next_tokens, mtp_valid(valid, documents, depth))
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
