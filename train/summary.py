"""What a person reads before step 1: the values that follow from the configuration."""

from __future__ import annotations

import os
from typing import Any

from longcat.counts import active_range, count_parameters, describe, flops_per_token
from longcat.model import LongCat, ModelPart
from parallel.chunks import ChunkChoice
from parallel.environment import describe_environment
from parallel.memory import in_a_step, state_bytes
from parallel.mesh import Topology
from train.check import batch_shape
from train.config import Config
from train.samples import PaddingShare, size_rows


def derived_values(config: Config, peak: float | None, chunks: ChunkChoice | None = None) -> dict[str, Any]:
    """The section `derived` of config.yaml. ``peak`` is the device's FLOP/s; None = not known."""
    counts = count_parameters(config.model)
    return {
        "parameters": counts.total,
        "mtp_parameters": counts.mtp,
        "active_parameters": list(active_range(config.model)),
        "flops_per_token": flops_per_token(config.model, config.train.sequence_length),
        **({} if peak is None else {"peak_gflops_per_rank": peak / 1e9}),
        **({} if chunks is None else {"chunks": chunks.as_mapping()}),
    }


def layers_of(part: ModelPart) -> str:
    """What a model part contains, for instance `embedding, layers 0-3`."""
    names = ["embedding"] if part.embedding else []
    names.append(f"layers {part.first}-{part.last - 1}" if part.last - part.first > 1 else f"layer {part.first}")
    return ", ".join([*names, *(["head"] if part.head else [])])


def header(
    config: Config,
    topology: Topology,
    parts: list[LongCat],
    peak: float,
    peak_source: str,
    padding: PaddingShare,
    chunks: ChunkChoice | None = None,
) -> list[tuple[str, str]]:
    """(name, value) lines of the terminal's panel."""
    train = config.train
    sizes = topology.sizes
    axes = ", ".join(f"{name} {size}" for name, size in vars(sizes).items() if size > 1) or "one of each"
    stages = [layers_of(model.part) for model in parts]
    own_parts: list[ModelPart | None] = [model.part for model in parts]
    memory = state_bytes(config.model, sizes, config.parallel.sharding, own_parts)
    micro_batches = batch_shape(config, sizes).num_micro_batches
    step = in_a_step(config.model, sizes, config.parallel, own_parts, micro_batches, train.dtype)
    environment = describe_environment(os.environ) if topology.device.type == "cuda" else ""
    return [
        ("run", str(config.run.folder)),
        ("model", config.model.name),
        *describe(config.model),
        *size_rows(config, padding),
        ("ranks", f"{topology.world_size} on {topology.device.type} ({axes})"),
        *([("pipeline", f"{config.parallel.schedule}; this rank: {' and '.join(stages)}")] if sizes.pp > 1 else []),
        ("memory per rank", f"{memory} (by formula; activations come on top)"),
        *([("in a step", step)] if step else []),
        ("compute", f"{train.dtype}, {peak / 1e9:,.0f} GFLOP/s per rank ({peak_source})"),
        *([("environment", environment)] if environment else []),
        *([("chunks", f"{config.overlap.num_chunks}; {chunks}")] if chunks is not None else []),
    ]
