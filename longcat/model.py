"""The LongCat-Flash language model: embedding, shortcut-connected layers, head, MTP, and all losses as sums."""

# B sequences, D width, V vocabulary, L local layers, N + Z routed experts
# S all positions, q positions of local queries, s local positions of the residual stream (longcat/interfaces.py)

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from longcat.attention import LatentAttention
from longcat.config import ModelConfig
from longcat.documents import Documents
from longcat.errors import ConfigError
from longcat.interfaces import SequenceModule, VocabularyModule, local_tensor
from longcat.layer import MTPLayer, ShortcutLayer
from longcat.modules import Embedding, Linear, RMSNorm
from longcat.moe import Router, RoutingStatistics
from longcat.ops.cross_entropy import runs_again
from longcat.parts import ModelPart
from longcat.rope import rotary_angles


class Losses(NamedTuple):
    """The local losses of one micro-batch. Sums, never means: the caller knows the global batch and divides.

    `balance`, `hidden_z` and `hidden_norm` are partial sums over the ranks that share a micro-batch; `lm`, `mtp` and
    `token_losses` are the same on all ranks that share a vocabulary. Without the head they are zero.
    """

    lm: Tensor  # Σ over valid tokens of -log p(label)
    mtp: Tensor  # the same for the MTP layers, over `mtp_valid` tokens; 0 while MTP is off
    balance: Tensor  # Σ over layers of the device-level balance loss (section 5), a mean over this micro-batch
    hidden_z: Tensor  # Σ over tokens, without padding, of (log Σ_i exp |z_i|)², z before the final norm (section 9)
    token_losses: Tensor  # [B, q] -log p(label), 0 where invalid; carries no gradient
    hidden_norm: Tensor  # likewise Σ of ‖z‖₂; carries no gradient
    counts: Tensor  # [L, N + Z] int64 selections by the local tokens, without padding
    balance_grad: Tensor  # [L, N + Z] see RoutingStatistics
    ffn_experts: Tensor  # [L, B, s] number of FFN experts of each token; 0 at padding
    hidden: Tensor  # [B, s, D] the residual stream after the last local layer; with the head it carries no gradient


class MTP(nn.Module):
    """Multi-token prediction: its layers and final norm; embedding and head are shared with the model."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MTPLayer(config) for _ in range(config.num_mtp_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class LongCat(SequenceModule, VocabularyModule):
    """A LongCat-Flash model with uninitialised weights (see `longcat.init`).

    ``balance_groups`` is D of the balance loss: a setting of the model, independent of the layout. ``part`` selects
    the part of the model to build; None means all.
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
        has_mtp = part.head and config.num_mtp_layers > 0
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size) if part.embedding or has_mtp else None
        self.layers = nn.ModuleDict(
            {str(number): ShortcutLayer(config, balance_groups) for number in range(part.first, part.last)}
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if part.head else None
        self.lm_head = Linear(config.hidden_size, config.vocab_size) if part.head else None
        self.mtp = MTP(config) if has_mtp else None

    def shortcut_layers(self) -> list[ShortcutLayer]:
        """The local layers, in the order of their global numbers."""
        return [layer for layer in self.layers.values() if isinstance(layer, ShortcutLayer)]

    def routers(self) -> list[Router]:
        return [layer.mlp.router for layer in self.shortcut_layers()]

    def use_config(self, config: ModelConfig) -> None:
        """Take rotary frequencies and the scale of scores from ``config``, in place; other fields must be as now."""
        self.config = config
        for module in self.modules():
            if isinstance(module, LatentAttention):  # the others read sizes only
                module.config = config

    def trunk(
        self, tokens: Tensor, documents: Documents | None, hidden: Tensor | None = None
    ) -> tuple[Tensor, list[RoutingStatistics]]:
        """tokens [B, S], or the previous part's hidden states [B, s, D] → [B, s, D], and each layer's statistics."""
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
        config = self.config
        return rotary_angles(positions, config.qk_rope_head_dim, config.rope_theta, config.rope_scaling)

    def logits(self, tokens: Tensor, documents: Documents | None = None) -> Tensor:
        """tokens [B, S] → next-token logits [B, S, V], of a model in one process."""
        assert self.norm is not None and self.lm_head is not None
        z, _ = self.trunk(tokens, documents)
        return self.lm_head(self.norm(z))

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        valid: Tensor,
        documents: Documents | None = None,
        mtp: bool = True,
        hidden: Tensor | None = None,
    ) -> Losses:
        """Losses of tokens, labels [B, S] int64 (labels[t] = tokens[t+1]), valid [B, S] bool.

        Every rank passes the ids of the full sequence. ``hidden`` [B, s, D] is the input of a part without embedding.
        """
        z, statistics = self.trunk(tokens, documents, hidden)
        zero = z.new_zeros((), dtype=torch.float32)
        lm, mtp_loss, z_loss, norm, token_losses = zero, zero, zero, zero, zero
        if self.norm is not None:
            normed = self.norm(z)
            with_mtp = mtp and self.mtp is not None
            lm, token_losses = self._cross_entropy(normed, labels, valid, is_last=not with_mtp)
            if with_mtp:
                mtp_loss = self._mtp_loss(normed, labels, valid, documents)
            padding = None
            if documents is not None and documents.padding is not None:
                padding = documents.padding.local(self.sequence)
            z_loss = hidden_z(z, padding)
            norms = torch.linalg.vector_norm(z.detach().float(), dim=-1)
            norm = (norms if padding is None else norms.masked_fill_(padding, 0.0)).sum()
        return Losses(
            # FSDP2 gathers weights when the backward comes to the node of an output. The clone's node is made after the
            # MTP layers, so the backward comes to every output before it runs any layer.
            lm=lm.clone(),
            mtp=mtp_loss,
            balance=torch.stack([s.balance for s in statistics]).sum(),
            hidden_z=z_loss,
            token_losses=token_losses,
            hidden_norm=norm,
            counts=torch.stack([s.counts for s in statistics]),
            balance_grad=torch.stack([s.balance_grad.detach() for s in statistics]),
            ffn_experts=torch.stack([s.ffn_experts for s in statistics]).view(-1, *z.shape[:2]),
            hidden=z if self.norm is None else z.detach(),
        )

    def _cross_entropy(self, normed: Tensor, labels: Tensor, valid: Tensor, is_last: bool) -> tuple[Tensor, Tensor]:
        """normed [B, s, D], labels, valid [B, S] → the sum of the losses at the q positions, and each loss [B, q].

        ``is_last``: no other loss of the head follows.
        """
        assert self.lm_head is not None
        labels, valid = self.sequence.select(labels), self.sequence.select(valid)
        rows = self.sequence.gather(normed).flatten(0, 1)
        weight = local_tensor(self.lm_head.weight)
        total, token_losses = self.vocabulary.cross_entropy(
            rows, weight, labels.flatten(), valid.flatten(), run_again=not is_last and runs_again(rows.device.type)
        )
        return total, token_losses.view_as(labels)

    def _mtp_loss(self, hidden: Tensor, labels: Tensor, valid: Tensor, documents: Documents | None) -> Tensor:
        """Σ of the MTP layers' cross-entropies; layer k (from 1) predicts the token k + 1 positions ahead.

        It reads the hidden states after the final norm: the report leaves this open, so it is the project's choice.
        """
        assert self.mtp is not None and self.embed_tokens is not None
        total = hidden.new_zeros((), dtype=torch.float32)
        angles = self.angles(labels)
        next_tokens = labels
        for depth, layer in enumerate(self.mtp.layers, start=1):
            hidden = self.mtp.norm(layer(hidden, self.embed_tokens(next_tokens), angles, documents))
            next_tokens = next_tokens.roll(-1, 1)  # before sharding: a shard lacks its neighbour's first token
            is_last = depth == len(self.mtp.layers)
            loss, _ = self._cross_entropy(hidden, next_tokens, mtp_valid(valid, documents, depth), is_last)
            total = total + loss
        return total


def mtp_valid(valid: Tensor, documents: Documents | None, depth: int) -> Tensor:
    """Where MTP layer ``depth`` (from 1) has a label: within the sample and, with document masks, the document."""
    shifted = valid.roll(-depth, 1).clone()
    shifted[:, -depth:] = False
    if documents is not None:
        shifted &= documents.numbers == documents.numbers.roll(-depth, 1)
    return shifted


def hidden_z(z: Tensor, padding: Tensor | None = None) -> Tensor:
    """Σ_t (log Σ_i exp |z_t,i|)² over tokens, in float32 (section 9; the caller, who knows T, multiplies by λ/T).

    z [B, s, D]; positions where ``padding`` [B, s] is True do not count.
    """
    squares = torch.logsumexp(z.float().abs(), -1).square()
    return (squares if padding is None else squares.masked_fill(padding, 0.0)).sum()
