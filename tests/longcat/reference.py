"""A slow LongCat-Flash in float64, written from the equations alone: one token and one expert at a time.

It shares no code with the package: it takes tensors under their logical names and returns the losses. Where
the model has a view of a matrix, a mask or a permutation, this has a loop.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from longcat.config import ModelConfig

# S positions, D width, N FFN experts, Z identity experts; one sequence at a time, so no batch dimension


@dataclass
class Routing:
    """What one router did with a sequence: probabilities [S, N+Z] and each position's chosen experts."""

    probabilities: Tensor
    chosen: list[list[int]]


@dataclass
class Forward:
    """One sequence: hidden states before the final norm [S, D] and each layer's routing."""

    z: Tensor
    routing: list[Routing]


class Reference:
    """The equations over named float64 tensors; section numbers are those of the project's equations."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
        self.config = config
        self.tensors = {name: tensor.detach().double() for name, tensor in tensors.items()}

    def weight(self, name: str) -> Tensor:
        return self.tensors[f"{name}.weight"]

    def norm(self, name: str, x: Tensor, eps: float | None = None) -> Tensor:
        """x · gain / √(mean x² + ε)."""
        eps = self.config.rms_norm_eps if eps is None else eps
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * self.weight(name)

    def ffn(self, name: str, x: Tensor) -> Tensor:
        gate = x @ self.weight(f"{name}.gate_proj").T
        up = x @ self.weight(f"{name}.up_proj").T
        return (gate / (1 + torch.exp(-gate)) * up) @ self.weight(f"{name}.down_proj").T

    def turn(self, x: Tensor, position: int) -> Tensor:
        """Rotary position: pair i of x [rope] is turned by position · θ^(-2i/rope)."""
        out = torch.empty_like(x)
        for i in range(0, len(x), 2):
            angle = position * self.config.rope_theta ** (-i / len(x))
            cos, sin = math.cos(angle), math.sin(angle)
            out[i] = x[i] * cos - x[i + 1] * sin
            out[i + 1] = x[i] * sin + x[i + 1] * cos
        return out

    def attention(self, name: str, x: Tensor) -> Tensor:
        """MLA with variance alignment (6): x [S, D] → [S, D]."""
        c = self.config
        alpha_q, alpha_kv = (
            math.sqrt(c.hidden_size / c.q_lora_rank),
            math.sqrt(c.hidden_size / c.kv_lora_rank),
        )
        eps = c.latent_norm_eps
        q = self.norm(f"{name}.q_a_layernorm", x @ self.weight(f"{name}.q_a_proj").T, eps)
        q = (alpha_q * q @ self.weight(f"{name}.q_b_proj").T).view(len(x), c.num_heads, -1)
        latent = x @ self.weight(f"{name}.kv_a_proj_with_mqa").T
        shared = torch.stack([self.turn(row[c.kv_lora_rank :], t) for t, row in enumerate(latent)])
        kv = alpha_kv * self.norm(f"{name}.kv_a_layernorm", latent[:, : c.kv_lora_rank], eps)
        kv = (kv @ self.weight(f"{name}.kv_b_proj").T).view(len(x), c.num_heads, -1)
        nope = c.qk_nope_head_dim
        out = torch.zeros(len(x), c.num_heads, c.v_head_dim, dtype=x.dtype)
        for t in range(len(x)):
            for head in range(c.num_heads):
                turned = self.turn(q[t, head, nope:], t)
                scores = kv[: t + 1, head, :nope] @ q[t, head, :nope] + shared[: t + 1] @ turned
                share = torch.softmax(scores / math.sqrt(nope + c.qk_rope_head_dim), 0)
                out[t, head] = share @ kv[: t + 1, head, nope:]
        return out.flatten(1) @ self.weight(f"{name}.o_proj").T

    def moe(self, name: str, u: Tensor) -> tuple[Tensor, Routing]:
        """Zero-computation experts (3): u [S, D] → [S, D]."""
        c = self.config
        probabilities = torch.softmax(u @ self.weight(f"{name}.router.classifier").T, -1)
        bias = self.tensors[f"{name}.router.e_score_correction_bias"]
        rows, chosen = [], []
        for t, x in enumerate(u):
            order = sorted(range(c.num_routed), key=lambda i: -float((probabilities[t, i] + bias[i]).detach()))
            chosen.append(order[: c.top_k])
            total = torch.zeros_like(x)
            for i in chosen[-1]:
                output = self.ffn(f"{name}.experts.{i}", x) if i < c.num_experts else x
                total = total + c.routed_scaling_factor * probabilities[t, i] * output
            rows.append(total)
        return torch.stack(rows), Routing(probabilities, chosen)

    def layer(self, name: str, x: Tensor) -> tuple[Tensor, Routing]:
        """The shortcut-connected layer (2)."""
        a = x + self.attention(f"{name}.self_attn.0", self.norm(f"{name}.input_layernorm.0", x))
        u = self.norm(f"{name}.post_attention_layernorm.0", a)
        m, routing = self.moe(f"{name}.mlp", u)
        b = a + self.ffn(f"{name}.mlps.0", u)
        c = b + self.attention(f"{name}.self_attn.1", self.norm(f"{name}.input_layernorm.1", b))
        return c + self.ffn(f"{name}.mlps.1", self.norm(f"{name}.post_attention_layernorm.1", c)) + m, routing

    def forward(self, tokens: Tensor) -> Forward:
        """tokens [S] → hidden states and routing."""
        x = self.weight("model.embed_tokens")[tokens]
        routing = []
        for number in range(self.config.num_layers):
            x, one = self.layer(f"model.layers.{number}", x)
            routing.append(one)
        return Forward(x, routing)

    def cross_entropy(self, hidden: Tensor, label: int) -> Tensor:
        """-log p(label) of one normed hidden state [D]."""
        logits = self.weight("lm_head") @ hidden
        return torch.logsumexp(logits, 0) - logits[label]

    def language_loss(self, z: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Σ over valid positions of -log p(label)."""
        hidden = self.norm("model.norm", z)
        terms = [self.cross_entropy(hidden[t], int(labels[t])) for t in range(len(labels)) if valid[t]]
        return torch.stack(terms).sum() if terms else z.new_zeros(())

    def prediction_loss(self, z: Tensor, labels: Tensor, valid: Tensor) -> Tensor:
        """Σ of the MTP layers' cross-entropies: layer k at position t predicts the token 1 + k after t.

        Layer 1 reads [norm(embedding of token t+1), norm(final hidden state t)]; layer k+1 reads the hidden
        state that layer k gives to the head. A position counts when its label is in the sample and valid.
        """
        hidden = self.norm("model.norm", z)
        total = z.new_zeros(())
        for depth in range(self.config.num_mtp_layers):
            name = f"model.mtp.layers.{depth}"
            num = len(labels) - depth  # positions whose input token t + 1 + depth is in the sample
            embedded = self.weight("model.embed_tokens")[labels[depth:]]
            pair = (self.norm(f"{name}.enorm.m", embedded), self.norm(f"{name}.hnorm.m", hidden[:num]))
            x = torch.cat(pair, -1) @ self.weight(f"{name}.eh_proj").T
            a = x + self.attention(f"{name}.self_attn", self.norm(f"{name}.input_layernorm", x))
            inner = self.norm(f"{name}.post_attention_layernorm", a)
            hidden = self.norm("model.mtp.norm", a + self.ffn(f"{name}.transformer_layer.mlp", inner))
            for t in range(num - 1):
                if valid[t + depth + 1]:
                    total = total + self.cross_entropy(hidden[t], int(labels[t + depth + 1]))
        return total


def hidden_z(z: Tensor) -> Tensor:
    """Σ_t (log Σ_i exp |z_t,i|)² (9)."""
    total = z.new_zeros(())
    for row in z:
        total = total + torch.log(torch.stack([torch.exp(value.abs()) for value in row]).sum()) ** 2
    return total


def balance(config: ModelConfig, layers: list[list[Routing]], num_groups: int) -> Tensor:
    """Σ over layers of the device-level balance loss (5); ``layers``: each layer's routings."""
    size = config.num_experts // num_groups
    groups = [list(range(j * size, (j + 1) * size)) for j in range(num_groups)]
    total = torch.zeros((), dtype=torch.float64)
    for sequences in layers:
        num_tokens = sum(len(routing.chosen) for routing in sequences)
        picks = [expert for routing in sequences for chosen in routing.chosen for expert in chosen]
        mean = torch.cat([routing.probabilities for routing in sequences]).sum(0) / num_tokens
        for group in groups:
            f = num_groups / (config.expected_ffn_experts * num_tokens) * sum(e in group for e in picks)
            total = total + f * mean[group].sum()
        spare = config.top_k - config.expected_ffn_experts
        if config.num_zero_experts and spare > 0:
            f = sum(e >= config.num_experts for e in picks) / (spare * num_tokens)
            total = total + f * mean[config.num_experts :].sum()
    return total
