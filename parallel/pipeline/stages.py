"""The layers of each pipeline stage and the stages of each rank: arithmetic, no process group."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from longcat.config import ModelConfig
from longcat.counts import flops_per_token
from longcat.errors import ConfigError
from longcat.parts import ModelPart
from parallel.config import Schedule

STAGES_PER_RANK = {"1f1b": 1, "interleaved": 2, "zbv": 2, "dualpipev": 2}
V_SCHEDULES = ("zbv", "dualpipev")  # the second half of the stages runs back over the ranks
SPLIT_BACKWARD = ("zbv", "dualpipev")  # weight gradients are deferred to fill the bubble


def num_stages(schedule: Schedule, pp: int) -> int:
    """Stages of a pipeline over ``pp`` ranks."""
    return pp * STAGES_PER_RANK[schedule]


def stages_of(schedule: Schedule, pp: int, rank: int) -> list[int]:
    """The stages of the pipeline's rank ``rank``, in ascending order."""
    if STAGES_PER_RANK[schedule] == 1:
        return [rank]
    return [rank, 2 * pp - 1 - rank if schedule in V_SCHEDULES else rank + pp]


def rank_of(schedule: Schedule, pp: int, stage: int) -> int:
    """The pipeline's rank that has ``stage``."""
    return next(rank for rank in range(pp) if stage in stages_of(schedule, pp, rank))


def fewest_micro_batches(schedule: Schedule, pp: int) -> int:
    """The fewest micro-batches per rank with which torch's schedule runs."""
    return {"1f1b": pp, "interleaved": 1, "zbv": 1, "dualpipev": 2 * pp}[schedule]


def check_micro_batches(schedule: Schedule, pp: int, num_micro_batches: int) -> None:
    """Raise ConfigError where the schedule cannot run this many micro-batches."""
    fewest = fewest_micro_batches(schedule, pp)
    if num_micro_batches < fewest:
        raise ConfigError(
            f"parallel.schedule={schedule} needs at least {fewest} micro-batches a rank with parallel.pp={pp} and has "
            f"{num_micro_batches}; raise train.global_batch_size or lower train.micro_batch_size"
        )
    rounds = max(1, num_micro_batches // pp)
    if schedule == "interleaved" and num_micro_batches % rounds:
        raise ConfigError(
            f"parallel.schedule=interleaved runs {num_micro_batches} micro-batches a rank in {rounds} equal rounds, "
            f"which they do not divide into; make them a multiple of parallel.pp={pp} with train.global_batch_size or "
            f"train.micro_batch_size, or use parallel.schedule=zbv"
        )


def is_replica(part: ModelPart, stored_name: str) -> bool:
    """Whether a part's tensor is a copy of another part's: the embedding that MTP layers read.

    Norms, hashes and checkpoints count it once, where the first layer is.
    """
    return not part.embedding and stored_name.startswith("embed_tokens.")


def split(config: ModelConfig, stages: int, sequence_length: int) -> list[ModelPart]:
    """Contiguous layers for each stage, chosen to minimise the cost of the costliest stage.

    Costs are FLOPs of forward and backward. The last stage also has the head, once more for each MTP layer, and the MTP
    layers; the embedding is free. Of equal choices the most even one wins, then the one with more layers in later
    stages, whose activations live shorter.

    Raises:
        ConfigError: there are fewer layers than stages.
    """
    if stages > config.num_layers:
        raise ConfigError(
            f"parallel.pp and parallel.schedule make {stages} pipeline stages, but with "
            f"model.num_layers={config.num_layers} not every one gets a layer; lower parallel.pp, use "
            f"parallel.schedule=1f1b (one stage a rank instead of two) or raise model.num_layers"
        )
    layer, last = stage_costs(config, sequence_length)
    sizes = _sizes(config.num_layers, stages, layer, last)
    ends = [sum(sizes[: stage + 1]) for stage in range(stages)]
    return [
        ModelPart(end - size, end, embedding=stage == 0, head=stage == stages - 1)
        for stage, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]


def stage_costs(config: ModelConfig, sequence_length: int) -> tuple[float, float]:
    """FLOPs per token of one layer, and of everything after the last layer (with MTP, if any)."""
    one_layer, two_layers = (flops_per_token(replace(config, num_layers=n), sequence_length) for n in (1, 2))
    with_mtp = flops_per_token(replace(config, num_layers=1), sequence_length, mtp=True)
    layer = two_layers - one_layer
    return layer, with_mtp - layer


def _sizes(num_layers: int, stages: int, layer: float, last: float) -> list[int]:
    """Layers of each stage, with the least largest cost, and of these choices the least sum of squares."""

    def cost(stage: int, size: int) -> float:
        return size * layer + (last if stage == stages - 1 else 0.0)

    @cache
    def largest(stage: int, left: int) -> float:
        if stage == stages - 1:
            return cost(stage, left)
        others = stages - 1 - stage
        return min(max(cost(stage, n), largest(stage + 1, left - n)) for n in range(1, left - others + 1))

    limit = largest(0, num_layers) * (1 + 1e-12)

    @cache
    def evenest(stage: int, left: int) -> tuple[float, tuple[int, ...]]:
        if stage == stages - 1:
            return (cost(stage, left) ** 2 if cost(stage, left) <= limit else float("inf")), (left,)
        best: tuple[float, tuple[int, ...]] = (float("inf"), ())
        for size in range(1, left - (stages - 1 - stage) + 1):
            if cost(stage, size) > limit:
                break
            rest, sizes = evenest(stage + 1, left - size)
            best = min(best, (rest + cost(stage, size) ** 2, (size, *sizes)), key=lambda choice: choice[0])
        return best

    return list(evenest(0, num_layers)[1])
