"""Bytes of weights, gradients and moments per rank, by formula from sizes alone; nothing is built."""

from __future__ import annotations

from dataclasses import dataclass

from longcat.config import ModelConfig
from longcat.counts import count_parameters
from longcat.parts import ModelPart
from parallel.config import Sharding
from parallel.expert.sharding import largest_share
from parallel.sizes import MeshSizes

FLOAT32 = 4


@dataclass(frozen=True)
class StateBytes:
    """A rank's weights and moments, and its gradients between backward and update, all in float32."""

    weights: float  # those of the forward, and fp32 master weights where separate
    gradients: float
    moments: float

    def __str__(self) -> str:
        named = (f"{name} {mib(count)}" for name, count in vars(self).items())
        return ", ".join(named)


def mib(count: float) -> str:
    """12.3 MiB, 4.56 GiB, 7.89 TiB."""
    if count >= 2**40:
        return f"{count / 2**40:,.2f} TiB"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


@dataclass(frozen=True)
class Elements:
    """Elements of a part of a model, by the ranks that they are sharded over."""

    experts: int  # over ep × efsdp
    tp_sharded: int  # heads, columns and vocabulary: over tp, then fsdp × cp
    tp_replicated: int  # latents, router, norms: over fsdp × cp × tp

    @property
    def total(self) -> int:
        return self.experts + self.tp_sharded + self.tp_replicated


def elements(config: ModelConfig, part: ModelPart | None = None) -> Elements:
    """Count the elements of a part (None = all) by kind."""
    part = part or ModelPart(0, config.num_layers, embedding=True, head=True)
    counts, d, heads = count_parameters(config), config.hidden_size, config.num_heads
    by_heads = heads * (
        config.q_lora_rank * config.qk_head_dim
        + config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
        + config.v_head_dim * d
    )
    layers = part.last - part.first
    tp_sharded = layers * (2 * by_heads + 2 * counts.dense_ffn)
    tp_replicated = layers * (2 * (counts.attention - by_heads) + counts.router + counts.norms)
    predictors = config.num_mtp_layers if part.head else 0
    if predictors:
        tp_sharded += predictors * (by_heads + counts.dense_ffn)
        tp_replicated += counts.mtp - predictors * (by_heads + counts.dense_ffn)
    tp_sharded += counts.embedding * (part.embedding or predictors > 0) + counts.head * part.head
    tp_replicated += d * part.head
    return Elements(layers * config.num_experts * counts.expert, tp_sharded, tp_replicated)


def state_bytes(config: ModelConfig, sizes: MeshSizes, sharding: Sharding, parts: list[ModelPart | None]) -> StateBytes:
    """Bytes of ``parts`` on one rank.

    FSDP2 shards everything over fsdp × cp × tp, also what tp or ep splits: ep × efsdp is the same ranks. Where experts
    do not divide, the rank with most of them is counted. DeepSpeed
    shards over dp × fsdp × cp. ZeRO 1 and 2 compute with unsharded weights (and this rank's experts) and keep fp32
    master weights; ZeRO-3 computes with shards that are gathered in turn.
    """
    counted = [elements(config, part) for part in parts]
    total = sum(one.total for one in counted)
    if sharding == Sharding.fsdp:
        experts = sum(one.experts for one in counted)
        share = (total - experts) / sizes.dense_shards + experts * largest_share(config, sizes)
        return StateBytes(weights=share * FLOAT32, gradients=share * FLOAT32, moments=2 * share * FLOAT32)
    share = total / (sizes.dp * sizes.fsdp * sizes.cp)
    computed = (
        share
        if sharding == Sharding.zero3
        else sum(one.tp_sharded + one.tp_replicated + one.experts / sizes.ep for one in counted)
    )
    return StateBytes(weights=(computed + share) * FLOAT32, gradients=share * FLOAT32, moments=2 * share * FLOAT32)
