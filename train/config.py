"""The configuration of a run: one tree of dataclasses that check themselves."""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path

from longcat.config import ModelConfig
from longcat.config_choices import check_choice
from longcat.config_limits import INT32_MAX, INT64_MAX, check_at_most, check_items, check_numbers
from longcat.errors import ConfigError
from parallel.config import DispatcherKind, OverlapConfig, ParallelConfig
from train.balance import BalanceConfig
from train.data.config import DataConfig
from train.health.config import HealthConfig, OnSpike
from train.keys.dotted import flatten
from train.launch_config import LaunchConfig
from train.objective import LossConfig
from train.optimizer import OptimConfig
from train.profiling.config import ProfileConfig
from train.schedule import ScheduleConfig
from train.sdc.config import SdcConfig
from train.stages.configs import check_stages
from train.sweeps.config import PruningConfig

MAX_LENGTH = 2**24
MAX_PROCESSES = 4096


class ComputeDtype(StrEnum):
    """Type of the model's matrix products."""

    bfloat16 = "bfloat16"
    float32 = "float32"
    auto = "auto"


class WandbMode(StrEnum):
    """Where wandb writes metrics."""

    offline = "offline"
    online = "online"
    disabled = "disabled"


@dataclass
class TrainConfig:
    """Length of the run, batch sizes, compute type."""

    steps: int = 1000  # steps of the whole run, counted from its first start
    seed: int = 0  # determines the initial values and the order of the samples
    sequence_length: int = 256  # tokens per sequence
    global_batch_size: int = 8  # sequences per step, over all ranks
    # sequences per forward and backward; divides the global batch into equal shares for all data ranks
    micro_batch_size: int = 1
    # compute type: bfloat16, float32, or auto = bfloat16 where the device multiplies it natively, else float32.
    # Weights, moments, router and reductions are always float32
    dtype: ComputeDtype = ComputeDtype.auto
    deterministic: bool = True  # ask torch for deterministic kernels
    # N: the same bits at every data-parallel size (parallel.dp × parallel.fsdp) that divides N, a power of two; choose
    # the largest size. Layout otherwise and micro-batch stay. 0 = off
    elastic_bits: int = 0
    stop_after_seconds: float = 0.0  # save and stop with exit code 3 after this many seconds; 0 = no limit

    def validate(self) -> None:
        for name in ("steps", "sequence_length", "global_batch_size", "micro_batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be at least 1")
        if self.sequence_length < 2:
            raise ConfigError(f"train.sequence_length={self.sequence_length} must be at least 2")
        check_at_most("train.sequence_length", self.sequence_length, MAX_LENGTH, "float32 positions are exact up to it")
        check_at_most("train.global_batch_size", self.global_batch_size, INT32_MAX)
        check_choice("train.dtype", self.dtype, ComputeDtype)
        if self.elastic_bits < 0:
            raise ConfigError(
                f"train.elastic_bits={self.elastic_bits} must be the largest data-parallel size, or 0 for off"
            )
        if self.elastic_bits and not self.deterministic:
            raise ConfigError(
                f"train.elastic_bits={self.elastic_bits} needs train.deterministic=true: other kernels do not repeat "
                f"their bits even at one size; change either"
            )
        if self.stop_after_seconds < 0:
            raise ConfigError(f"train.stop_after_seconds={self.stop_after_seconds} must not be negative")
        if self.global_batch_size % self.micro_batch_size:
            raise ConfigError(
                f"train.micro_batch_size={self.micro_batch_size} does not divide train.global_batch_size="
                f"{self.global_batch_size}; change either"
            )


@dataclass
class ValidationConfig:
    """Validation on the held-out documents: the same sequences every time."""

    every: int = 100  # steps between validations; 0 = never. The last step validates too
    batches: int = 8  # global batches of held-out text, the same ones each time
    # global batches of held-out text of each corpus alone, where data.paths has several; 0 = not measured
    corpus_batches: int = 2
    # say so when a corpus's loss is this many nats per token above its lowest; 0 = never
    worse_by: float = 0.05
    # after the last step, fit n-gram models to the same training tokens (up to 20 million) for comparison
    ngram_baselines: bool = False
    documents: int = 3  # held-out documents that the HTML report colours by FFN experts per token; 0 = none

    def validate(self) -> None:
        for name in ("every", "documents", "corpus_batches", "worse_by"):
            if getattr(self, name) < 0:
                raise ConfigError(f"validation.{name}={getattr(self, name)} must not be negative")
        if self.batches < 1:
            raise ConfigError(f"validation.batches={self.batches} must be at least 1")


@dataclass
class CheckpointConfig:
    """When checkpoints are written, which are kept, and where a run starts from."""

    every: int = 200  # steps between checkpoints; 0 = only at the end and when stopped
    # minutes between checkpoints by the first rank's clock, in addition to `every`; 0 = never
    every_minutes: float = 0.0
    keep: int = 2  # number of newest checkpoints to keep; 0 = all
    keep_every: int = 0  # keep every checkpoint whose step is a multiple of this; 0 = none
    # number of checkpoints with the lowest finite validation loss to keep; needs validation.every; 0 = none
    keep_best: int = 0
    # block training only for a copy to host memory and write beside it; false = block until it is on disk
    asynchronous: bool = True
    # auto = the newest valid checkpoint of this run, if any; never = require an empty run folder; or the folder of a
    # checkpoint or of another run to start from
    resume: str = "auto"

    def __post_init__(self) -> None:
        self.resume = os.path.expanduser(self.resume)

    def validate(self) -> None:
        for name in ("every", "every_minutes", "keep", "keep_every", "keep_best"):
            if getattr(self, name) < 0:
                raise ConfigError(f"checkpoint.{name}={getattr(self, name)} must not be negative")
        if not self.resume:
            raise ConfigError("checkpoint.resume is empty; use auto, never or a checkpoint's folder")


@dataclass
class LoggingConfig:
    """What is logged, and how often. metrics.jsonl gets every step in any case."""

    every: int = 1  # steps between lines on the terminal
    wandb: WandbMode = WandbMode.offline  # offline, online or disabled
    wandb_project: str | None = None  # null: the environment's WANDB_PROJECT, or longcat
    wandb_entity: str | None = None  # user or team; null: the environment's WANDB_ENTITY, or the user's default
    wandb_group: str | None = None  # null: the environment's WANDB_RUN_GROUP, or none
    wandb_tags: list[str] = field(default_factory=list)  # empty: the environment's WANDB_TAGS, or none
    tensorboard: bool = False  # also write event files to the run's folder `tensorboard`; needs that package
    hash_every: int = 0  # steps between state hashes; 0 = never
    routing_every: int = (
        5  # steps between lines of routing.jsonl (expert loads and biases) and norms of gradients by layer; 0 = never
    )

    def validate(self) -> None:
        check_choice("logging.wandb", self.wandb, WandbMode)
        if self.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ConfigError(
                "logging.tensorboard=true needs the package tensorboard, which is not installed; run `pip install "
                "tensorboard` or set logging.tensorboard=false"
            )
        if self.every < 1:
            raise ConfigError(f"logging.every={self.every} must be at least 1")
        for name in ("hash_every", "routing_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"logging.{name}={getattr(self, name)} must not be negative")


@dataclass
class RunConfig:
    """Where the run folder is and how many local processes `longcat train` starts."""

    name: str = "default"  # name of the run's folder
    dir: str = "runs"  # parent folder; the run's folder is `<dir>/<name>`
    # local ranks that `longcat train` starts, at most one per GPU; -1 = one per GPU, or one on a CPU. torchrun sets its
    # own number
    num_processes: int = -1

    def __post_init__(self) -> None:
        self.dir = os.path.expanduser(self.dir)

    def validate(self) -> None:
        if not re.fullmatch(r"[\w.,=+-]+", self.name) or self.name in (".", ".."):
            raise ConfigError(f"run.name={self.name!r} must be one folder name of letters, digits and . , = + - _")
        if self.num_processes < 1 and self.num_processes != -1:
            raise ConfigError(f"run.num_processes={self.num_processes} must be at least 1, or -1 to find out")
        check_at_most("run.num_processes", self.num_processes, MAX_PROCESSES)

    @property
    def folder(self) -> Path:
        return Path(self.dir) / self.name


@dataclass
class Config:
    """Everything a run depends on."""

    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    data: DataConfig = field(default_factory=lambda: DataConfig(name="python_source", source="python_source"))
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    sdc: SdcConfig = field(default_factory=SdcConfig)
    pruning: PruningConfig = field(default_factory=PruningConfig)
    run: RunConfig = field(default_factory=RunConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    def validate(self) -> None:
        """Check every section, then what only several of them together can show."""
        check_items(self, "")
        check_numbers(flatten(asdict(self)))
        for section in fields(self):
            getattr(self, section.name).validate()
        if self.checkpoint.keep_best and not self.validation.every:
            raise ConfigError(
                f"checkpoint.keep_best={self.checkpoint.keep_best} goes by the validation loss and validation.every=0 "
                f"measures none; set either"
            )
        if self.health.on_spike == OnSpike.rollback and not (self.checkpoint.every or self.checkpoint.every_minutes):
            raise ConfigError(
                "health.on_spike=rollback goes back to checkpoints and checkpoint.every=0 writes none; set it, or use "
                "health.on_spike=skip"
            )
        if self.pruning.percentile and not self.validation.every:
            raise ConfigError(
                f"pruning.percentile={self.pruning.percentile} goes by the validation loss and validation.every=0 "
                f"measures none; set either"
            )
        self.profile.validate_steps(self.train.steps)
        self._validate_tokens()
        check_stages(self)
        if self.model.num_experts % self.balance.num_groups:
            raise ConfigError(
                f"balance.num_groups={self.balance.num_groups} does not divide model.num_experts="
                f"{self.model.num_experts}; use a divisor of it"
            )
        if self.overlap.experts_stream and self.parallel.transport != DispatcherKind.all_to_all:
            raise ConfigError(
                f"overlap.experts_stream=true needs parallel.transport=all_to_all, not {self.parallel.transport}; "
                f"change either"
            )

    @property
    def trains_mtp(self) -> bool:
        """Whether MTP is computed, once `loss.mtp_start_tokens` have been seen."""
        return self.model.num_mtp_layers > 0 and self.loss.mtp_weight > 0

    def validate_sizes(self) -> None:
        """Check what a stage of `data.stages` may change."""
        for section in (self.train, self.model, self.loss):
            section.validate()
        self._validate_tokens()

    def _validate_tokens(self) -> None:
        train = self.train
        if train.steps * train.global_batch_size * train.sequence_length > INT64_MAX:
            raise ConfigError(
                f"train.steps={train.steps} of {train.global_batch_size} × {train.sequence_length} tokens are more "
                f"tokens than 64 bits count; lower train.steps"
            )
        if self.model.num_mtp_layers >= train.sequence_length:
            raise ConfigError(
                f"model.num_mtp_layers={self.model.num_mtp_layers} predict further ahead than a sequence of "
                f"train.sequence_length={train.sequence_length} has positions; lower it or use longer sequences"
            )

    def validate_world(self, data_ranks: int) -> None:
        """Check what depends on the number of ranks that read data."""
        micro_batches = self.train.global_batch_size // self.train.micro_batch_size
        if micro_batches % data_ranks:
            raise ConfigError(
                f"train.global_batch_size={self.train.global_batch_size} is {micro_batches} micro-batches of "
                f"{self.train.micro_batch_size}, which {data_ranks} data-parallel ranks cannot share equally; make "
                f"train.global_batch_size a multiple of {self.train.micro_batch_size * data_ranks} or lower "
                f"train.micro_batch_size"
            )
