"""`longcat plan`: the memory of ranks at several imbalances of the routing, and a step's FLOPs; nothing is trained."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch.distributed as dist

from launch.local import num_processes
from launch.options import split_options
from launch.plan.trace import Traced, trace
from longcat.counts import flops_per_token, human
from longcat.errors import ConfigError
from parallel.device import fastest_dtype
from parallel.memory import StateBytes, mib, state_bytes
from parallel.mesh import MeshSizes, resolve_sizes
from train.compose import compose
from train.config import ComputeDtype, Config

IMBALANCES = (1.0, 1.5, 2.0)  # rows that a rank's experts receive, over their fair share


@dataclass
class Plan:
    """The options of `longcat plan`."""

    ranks: int = 0  # ranks of the run; 0 = those that would start here
    rank: int = 0  # the rank to trace
    memory_gib: float = 0.0  # of each rank; 0 = say nothing of whether it fits


@dataclass
class PlanOptions:
    plan: Plan = field(default_factory=Plan)


@dataclass(frozen=True)
class Planned:
    """What `longcat plan` prints."""

    ranks: int
    sizes: MeshSizes
    dtype: str
    formula: StateBytes
    traces: dict[float, Traced]  # by imbalance
    flops: float  # of a step, all ranks

    @property
    def peak(self) -> int:
        return max(found.peak for found in self.traces.values())


def plan(arguments: list[str]) -> tuple[Planned, Plan]:
    """Plan what ``arguments`` configure. Process groups of this process must not exist."""
    assert not dist.is_initialized()
    options, overrides = split_options(PlanOptions, arguments)
    config, wanted = compose(overrides), options.plan
    if config.train.dtype == ComputeDtype.auto:
        config.train.dtype = ComputeDtype(str(fastest_dtype()).removeprefix("torch."))
    ranks = wanted.ranks or num_processes(config)
    sizes = resolve_sizes(config.parallel, ranks)
    if not 0 <= wanted.rank < ranks:
        raise ConfigError(f"plan.rank={wanted.rank} is none of the {ranks} ranks; use 0 to {ranks - 1}")
    _check_batch(config, sizes)
    imbalances = IMBALANCES if sizes.ep > 1 else IMBALANCES[:1]
    traces = {factor: trace(config, ranks, wanted.rank, factor) for factor in imbalances}
    train = config.train
    flops = flops_per_token(config.model, train.sequence_length, mtp=True)
    return Planned(
        ranks,
        sizes,
        str(train.dtype),
        state_bytes(config.model, sizes, config.parallel.sharding, [None]),
        traces,
        flops * train.global_batch_size * train.sequence_length,
    ), wanted


def _check_batch(config: Config, sizes: MeshSizes) -> None:
    train = config.train
    unit = train.micro_batch_size * sizes.data_ranks
    if train.global_batch_size % unit:
        raise ConfigError(
            f"train.global_batch_size={train.global_batch_size} is no multiple of {sizes.data_ranks} data ranks × "
            f"train.micro_batch_size={train.micro_batch_size}; use {-(-train.global_batch_size // unit) * unit}"
        )


def as_json(found: Planned) -> str:
    """The plan for machines; bytes and FLOPs."""
    content: dict[str, Any] = asdict(found)
    content["traces"] = [{"imbalance": factor, **asdict(one)} for factor, one in found.traces.items()]
    return json.dumps(content, indent=2)


def rows(found: Planned, wanted: Plan) -> list[tuple[str, str]]:
    """(name, value) lines for people."""
    axes = ", ".join(f"{name} {size}" for name, size in vars(found.sizes).items() if size > 1) or "one of each axis"
    lines = [
        ("ranks", f"{found.ranks} ({axes}), {found.dtype}; rank {wanted.rank} traced"),
        ("state by formula", str(found.formula)),
    ]
    for factor, one in found.traces.items():
        rest = one.peak - one.state
        lines.append((f"peak at {factor:g}×", f"{mib(one.peak)}: state {mib(one.state)}, a step {mib(rest)}"))
    lines.append(("FLOPs of a step", human(found.flops)))
    if wanted.memory_gib:
        fits = found.peak <= wanted.memory_gib * 2**30
        lines.append(("fits", f"{'yes' if fits else 'no'}, in {wanted.memory_gib:g} GiB" + ("" if fits else _knob())))
    return lines


def _knob() -> str:
    return "; try parallel.recompute=full, a smaller train.micro_batch_size, or more parallel.fsdp"
