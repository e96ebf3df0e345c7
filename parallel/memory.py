"""Bytes per rank of the training state and of what a step keeps beside it, by formula from sizes alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from longcat.config import ModelConfig
from longcat.counts import count_parameters
from longcat.parts import ModelPart
from parallel.config import Accumulate, ParallelConfig, Sharding
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


@dataclass(frozen=True)
class StepBytes:
    """What FSDP2 keeps on a rank in a step beside state and activations, without the padding of uneven shards."""

    gathered_weights: float  # in the compute dtype
    accumulated_gradients: float  # of unsharded weights, in float32, between micro-batches
    sums_in_progress: float  # float32 inputs of reduce-scatters that are kept until these end

    @property
    def total(self) -> float:
        """A layer's accumulated gradients become the input of its sum."""
        return self.gathered_weights + max(self.accumulated_gradients, self.sums_in_progress)

    def __str__(self) -> str:
        kept = f", accumulated gradients {mib(self.accumulated_gradients)}" if self.accumulated_gradients else ""
        return f"gathered weights {mib(self.gathered_weights)}{kept}, sums in progress {mib(self.sums_in_progress)}"


def step_bytes(
    config: ModelConfig,
    sizes: MeshSizes,
    parallel: ParallelConfig,
    parts: list[ModelPart | None],
    num_micro_batches: int,
    compute_bytes: int,
) -> StepBytes:
    """What a step of ``num_micro_batches`` on one rank keeps of ``parts``; zeros under DeepSpeed, which has buckets.

    ``compute_bytes``: of a number in the compute dtype. Below 4 routers are gathered in float32, as units of their own.
    The embedding, head and norms stay gathered; of the layers two are, the one that computes and the next, or all under
    a pipeline and with reshard_after_forward=false. `keep_gradients_in_flight` says which sums are in progress.
    """
    if parallel.sharding != Sharding.fsdp:
        return StepBytes(0.0, 0.0, 0.0)
    whole = [part or ModelPart(0, config.num_layers, embedding=True, head=True) for part in parts]
    layer = _layer_groups(config, sizes, compute_bytes)
    predictor = _predictor_elements(config, sizes)
    predictors = config.num_mtp_layers * sum(part.head for part in whole)
    layers = sum(part.last - part.first for part in whole)
    elements_of_all = sum(_unsharded(elements(config, part), sizes) for part in whole)
    rest = elements_of_all - layers * sum(layer) - predictors * predictor
    router = layer[-1] if compute_bytes < FLOAT32 else 0.0
    layer_weights = (sum(layer) - router) * compute_bytes + router * FLOAT32
    stays = sizes.pp > 1 or not parallel.reshard_after_forward
    units = sorted([layer_weights] * layers + [predictor * compute_bytes] * predictors, reverse=True)
    gathered = rest * compute_bytes + sum(units if stays else units[:2])
    accumulates = parallel.accumulate == Accumulate.unsharded and (sizes.pp > 1 or num_micro_batches > 1)
    above = sum(layer[: -2 if router else -1]) if layers > 1 else 0.0  # all but the group that is sent first
    sums = sum(layer) + max(above, rest - layer[-1])  # in a layer, or in the end, when the rest is sent
    return StepBytes(gathered, elements_of_all * FLOAT32 * accumulates, sums * FLOAT32)


def in_a_step(
    config: ModelConfig,
    sizes: MeshSizes,
    parallel: ParallelConfig,
    parts: list[ModelPart | None],
    num_micro_batches: int,
    dtype: str,
) -> str:
    """`step_bytes` for people, with the way in which gradients accumulate; empty under DeepSpeed."""
    found = step_bytes(
        config, sizes, parallel, parts, num_micro_batches, FLOAT32 if dtype == "float32" else FLOAT32 // 2
    )
    if not found.total:
        return ""
    if num_micro_batches == 1:
        return str(found)
    if parallel.accumulate == Accumulate.sharded:
        return f"{found}; each of {num_micro_batches} micro-batches is summed over the ranks into shards"
    cure = "; parallel.accumulate=sharded keeps none" if sizes.pp == 1 else ""
    return f"{found}; {num_micro_batches} micro-batches add up before they are summed over the ranks{cure}"


def _unsharded(counted: Elements, sizes: MeshSizes) -> float:
    """Elements that a rank gathers."""
    return counted.experts / sizes.ep + counted.tp_sharded / sizes.tp + counted.tp_replicated


def _layer_groups(config: ModelConfig, sizes: MeshSizes, compute_bytes: int) -> list[float]:
    """Elements of a layer's groups of parameters in FSDP2's order, one a mesh; the router at the end if it is a unit.

    The backward sends the last one first.
    """
    layer = elements(config, ModelPart(0, 1, embedding=False, head=False))
    router = float(count_parameters(config).router)
    groups = [layer.tp_replicated - router]
    if sizes.tp > 1:
        groups.append(layer.tp_sharded / sizes.tp)
    else:
        groups[0] += layer.tp_sharded
    if sizes.ep > 1:
        groups.append(layer.experts / sizes.ep)
    else:
        groups[0] += layer.experts
    if compute_bytes < FLOAT32:
        return [*groups, router]
    return [groups[0] + router, *groups[1:]]


def _predictor_elements(config: ModelConfig, sizes: MeshSizes) -> float:
    """Elements that a rank gathers for an MTP layer."""
    if not config.num_mtp_layers:
        return 0.0
    without = elements(config, ModelPart(0, 1, embedding=True, head=True))
    bare = elements(replace(config, num_mtp_layers=0), ModelPart(0, 1, embedding=True, head=True))
    final_norm = config.hidden_size  # of the MTP layers, in the root's unit
    return (_unsharded(without, sizes) - _unsharded(bare, sizes) - final_norm) / config.num_mtp_layers
