"""`longcat plan`: whether a run fits, how fast it would be and what to change, from traces of its ranks."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field, replace

import torch.distributed as dist

from launch.local import num_ranks
from launch.options import split_options
from launch.plan.cluster import Cluster, find_cluster
from launch.plan.ranks import summaries
from launch.plan.summary import Summary, peak_bytes
from launch.plan.times import StepTimes, predict
from launch.plan.trace import check_traceable
from longcat.config_limits import check_at_most, check_numbers
from longcat.counts import flops_per_token
from longcat.errors import ConfigError
from parallel.config import AUTO, Recompute
from parallel.device import fastest_dtype
from parallel.mesh import MeshSizes, resolve_sizes
from train.check import batch_shape, check_batch
from train.compose import compose
from train.config import ComputeDtype, Config
from train.samples import PaddingShare, find_padding
from train.stages.configs import check_each_stage, segments_of, stage_config

IMBALANCES = (1.0, 1.5, 2.0)  # rows that a rank's experts receive, over their fair share
ENOUGH = 2  # changes that fit
MAX_RANKS = 1_000_000  # of a mesh that this process lays out
SECONDS_A_YEAR = 365 * 86400.0


@dataclass
class PlanOptions:
    """What `longcat plan` assumes, as `plan.KEY`. The other arguments are those of `longcat train`."""

    ranks: int = 0  # GPUs of the run; 0 = the processes that would start here
    cluster: str = "h800"  # h100, h800, h200, b200, or a YAML file with the fields of launch/plan/cluster.py
    # stage of data.stages to plan, counted from 1; 0 = before the first; -1 = the one with the longest sequences
    stage: int = -1
    exact: bool = False  # trace every layer instead of two and three
    faults_per_gpu_year: float = 0.17  # that end the run; Llama 3's 54 days on 16,384 H100 had 419: 0.17
    save_seconds: float = 4.0  # that a checkpoint stops training; the LongCat-Flash report has 2 to 4
    restart_seconds: float = 600.0  # from a fault to the next step; the report stays below 10 minutes
    candidates: int = 6  # of search: the layouts that are traced, after a first choice by formula


@dataclass
class Arguments:
    """The options by their section."""

    plan: PlanOptions = field(default_factory=PlanOptions)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank's tensors."""

    place: int  # in the pipeline
    state: float  # weights and moments
    peak: dict[float, float]  # by imbalance


@dataclass(frozen=True)
class Availability:
    """What faults cost, by Young's and Daly's formula."""

    hours_between_faults: float
    interval_seconds: float  # between checkpoints, that costs least
    interval_steps: int
    share: float  # of the time that is progress


@dataclass(frozen=True)
class Knob:
    """A change of the configuration, and what it brings."""

    override: str
    peak: float  # bytes of the fullest rank then
    seconds: float  # of a step then


@dataclass(frozen=True)
class Planned:
    """What `longcat plan` prints."""

    config: Config
    options: PlanOptions
    cluster: Cluster
    ranks: int
    sizes: MeshSizes
    micro_batches: int  # of a data rank
    memory: list[Memory]
    padding: PaddingShare  # of packed samples: planned like text, but not counted
    flops: float  # the model's, of a step, all ranks: 6 per active parameter and token of text, and causal attention
    executed: float  # what the ranks compute, with recomputation
    times: dict[float, StepTimes]  # by imbalance
    availability: Availability
    knobs: list[Knob]
    stage: str = ""  # of data.stages, which is planned; empty without stages
    chooses_chunks: bool = False  # overlap.num_chunks=auto, for which `config` has the number that a run would choose

    @property
    def peak(self) -> float:
        return max(one.peak[1.0] for one in self.memory)

    @property
    def needed(self) -> dict[float, float]:
        """Bytes of the fullest rank's GPU by imbalance, with what no tensor has."""
        return {
            factor: self.cluster.needed(max(one.peak[factor] for one in self.memory)) for factor in self.memory[0].peak
        }

    def fits(self, factor: float = 1.0) -> bool:
        return self.needed[factor] <= self.cluster.capacity


def read(arguments: list[str]) -> tuple[Config, PlanOptions]:
    """The run and the plan's assumptions that ``arguments`` describe."""
    options, overrides = split_options(Arguments, arguments)
    unknown = [one for one in overrides if one.startswith("plan.")]
    if unknown:
        known = ", ".join(f"plan.{name}" for name in vars(options.plan))
        raise ConfigError(f"unknown key {unknown[0].partition('=')[0]!r}; longcat plan has {known}")
    return compose(overrides), check_options(options.plan)


def check_options(options: PlanOptions) -> PlanOptions:
    """Raise ConfigError for numbers that cannot be."""
    check_numbers({f"plan.{name}": value for name, value in vars(options).items() if isinstance(value, int | float)})
    for name, least in (
        ("ranks", 0),
        ("faults_per_gpu_year", 0),
        ("save_seconds", 0),
        ("restart_seconds", 0),
        ("candidates", 1),
    ):
        if getattr(options, name) < least:
            raise ConfigError(f"plan.{name}={getattr(options, name)} must be at least {least}")
    check_at_most("plan.ranks", options.ranks, MAX_RANKS)
    return options


def plan(
    config: Config,
    options: PlanOptions,
    with_knobs: bool = True,
    factors: tuple[float, ...] = IMBALANCES,
    padding: PaddingShare | None = None,
) -> Planned:
    """Plan a run at the imbalances ``factors``, 1 among them. Process groups of this process must not exist.

    ``padding`` is that of another plan with the same data; None: it is looked up.

    Raises:
        ConfigError: the run would be refused, or cannot be traced.
    """
    assert not dist.is_initialized()
    cluster = find_cluster(options.cluster)
    number, config = choose_stage(config, options), copy.deepcopy(config)
    if config.train.dtype == ComputeDtype.auto:
        dtype = ComputeDtype.bfloat16 if cluster.on_gpu else str(fastest_dtype()).removeprefix("torch.")
        config.train.dtype = ComputeDtype(dtype)
    ranks = options.ranks or num_ranks(config)
    sizes = check(config, ranks)
    stage = "" if number is None else f"{number} of data.stages; plan.stage=N plans another one"
    padding = find_padding(config, number or 0) if padding is None else padding
    config = stage_config(config, number or 0)
    batch = batch_shape(config, sizes)
    factors = factors if sizes.ep > 1 else (1.0,)

    def predicted() -> tuple[dict[float, list[Summary]], dict[float, StepTimes]]:
        traced = summaries(config, ranks, sizes, cluster, options.exact, factors)
        return traced, {
            factor: predict(config, sizes, batch, cluster, one, factor, padding.share) for factor, one in traced.items()
        }

    chooses = config.overlap.num_chunks == AUTO
    config.overlap.num_chunks = config.overlap.decided_chunks
    found_by, times = predicted()
    if chooses and config.overlap.enabled and times[1.0].chunks != config.overlap.num_chunks:
        config.overlap.num_chunks = times[1.0].chunks
        found_by, times = predicted()
    train = config.train
    hidden = batch.sequences * batch.length // (sizes.cp * sizes.tp) * config.model.hidden_size
    hidden_bytes = hidden * (2 if train.dtype == ComputeDtype.bfloat16 else 4)

    def peak(factor: float, place: int) -> float:
        found = found_by[factor][place]
        return peak_bytes(found, config.parallel, sizes, place, batch.num_micro_batches, hidden_bytes)

    memory = [
        Memory(place, one.of("state"), {factor: peak(factor, place) for factor in factors})
        for place, one in enumerate(found_by[1.0])
    ]
    per_rank = [
        batch.num_micro_batches * sum(v for k, v in one.numbers.items() if k[0] == "flops" and k[1] != -1)
        for one in found_by[1.0]
    ]
    flops = flops_per_token(config.model, train.sequence_length, mtp=config.trains_mtp)
    found = Planned(
        config,
        options,
        cluster,
        ranks,
        sizes,
        batch.num_micro_batches,
        memory,
        padding,
        flops * train.global_batch_size * train.sequence_length * (1 - padding.share),
        sum(per_rank) * ranks / sizes.pp,
        times,
        availability(options, ranks, times[1.0].seconds),
        [],
        stage,
        chooses,
    )
    return replace(found, knobs=knobs(found)) if with_knobs and not found.fits() else found


def choose_stage(config: Config, options: PlanOptions) -> int | None:
    """The stage to plan; None if the run has none that changes sizes."""
    parts = segments_of(config)
    if not -1 <= options.stage < len(parts):
        raise ConfigError(
            f"plan.stage={options.stage} is no stage: data.stages has {len(parts) - 1}; use 0 to {len(parts) - 1}, or "
            f"-1 for the longest"
        )
    if options.stage >= 0:
        return options.stage
    longest = max(parts, key=lambda part: part.length)
    return None if longest.length == parts[0].length else longest.number


def check(config: Config, ranks: int) -> MeshSizes:
    """The mesh's sizes; raises ConfigError for what a run or a trace would refuse in any stage of `data.stages`."""
    sizes = resolve_sizes(config.parallel, ranks)

    def check_stage(resolved: Config) -> None:
        check_traceable(resolved, sizes)
        check_batch(resolved, sizes)

    check_each_stage(config, check_stage)
    return sizes


def availability(options: PlanOptions, ranks: int, step_seconds: float) -> Availability:
    """The interval between checkpoints that loses least, and what is left of the time.

    A fault costs the restart and half an interval; a checkpoint costs what it stops training.
    """
    rate = options.faults_per_gpu_year * ranks / SECONDS_A_YEAR  # a second
    if not rate:
        return Availability(math.inf, math.inf, 0, 1.0)
    interval = max(math.sqrt(2 * options.save_seconds / rate), step_seconds)
    steps = max(1, round(interval / step_seconds))
    lost = options.save_seconds / interval + rate * (interval / 2 + options.restart_seconds)
    return Availability(1 / rate / 3600, interval, steps, max(0.0, 1 - lost))


def knobs(found: Planned) -> list[Knob]:
    """Changes that save memory, the fastest that fits first; those that do not fit by what they leave.

    Each costs two traces, so no more are tried once two fit.
    """
    tried: list[tuple[bool, Knob]] = []
    for override in changes(found):
        if sum(not too_large for too_large, _ in tried) >= ENOUGH:
            break
        config = copy.deepcopy(found.config)
        key, _, value = override.partition("=")
        section, name = key.split(".")
        kept = getattr(getattr(config, section), name)
        setattr(getattr(config, section), name, type(kept)(value))
        try:
            options = replace(found.options, ranks=found.ranks, stage=-1)
            other = plan(config, options, with_knobs=False, factors=(1.0,), padding=found.padding)
        except ConfigError:
            continue
        if other.peak < found.peak:
            tried.append((not other.fits(), Knob(override, other.needed[1.0], other.times[1.0].seconds)))
    tried.sort(key=lambda one: (one[0], one[1].peak if one[0] else one[1].seconds))
    return [knob for _, knob in tried[:3]]


def changes(found: Planned) -> list[str]:
    """Overrides to try, each a step from the configuration."""
    config, sizes = found.config, found.sizes
    presets = list(Recompute)
    tried = [f"parallel.recompute={one}" for one in presets[presets.index(config.parallel.recompute) + 1 :]]
    if config.train.micro_batch_size > 1:
        tried.append(f"train.micro_batch_size={config.train.micro_batch_size // 2}")
    for axis in ("cp", "ep"):
        size = getattr(sizes, axis) * 2
        if axis == "ep" or config.parallel.fsdp == -1:
            tried.append(f"parallel.{axis}={size}")
    return tried
