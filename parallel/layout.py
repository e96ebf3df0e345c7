"""Which models and batches can be sharded over which meshes: rules, checked before torch is imported."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from parallel.config import Accumulate, ParallelConfig, Sharding
from parallel.deepspeed.options import check as check_deepspeed
from parallel.environment import count_gpus
from parallel.expert.sharding import check_expert_shards
from parallel.pipeline.stages import check_micro_batches, num_stages, split
from parallel.sizes import MeshSizes


@dataclass(frozen=True)
class BatchShape:
    """What one data rank reads for a step."""

    num_micro_batches: int
    sequences: int  # of a micro-batch
    length: int


def check_layout(
    config: ModelConfig, parallel: ParallelConfig, sizes: MeshSizes, sequence_length: int, num_micro_batches: int
) -> None:
    """Raise ConfigError where a model or a step cannot be sharded over a mesh of these sizes.

    ``num_micro_batches`` are those of one data rank.
    """
    if sizes.pp > 1:
        if parallel.accumulate == Accumulate.sharded:
            raise ConfigError(
                f"parallel.accumulate=sharded and parallel.pp={sizes.pp}: a pipeline reduces gradients once a step; "
                f"change either"
            )
        split(config, num_stages(parallel.schedule, sizes.pp), sequence_length)
        check_micro_batches(parallel.schedule, sizes.pp, num_micro_batches)
    if parallel.sharding != Sharding.fsdp:
        check_deepspeed(parallel, sizes)
    check_compile(parallel)
    check_tensor(config, sizes.tp)
    check_experts(config, sizes.ep)
    if parallel.sharding == Sharding.fsdp:
        check_expert_shards(config, sizes)
    check_length(sequence_length, sizes.cp, sizes.tp)


def check_compile(config: ParallelConfig) -> None:
    """Raise ConfigError where compiling cannot work, with the reason."""
    if config.compile and not count_gpus() and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ConfigError("parallel.compile=true needs a C++ compiler on a CPU; install g++ or set it to false")


def check_experts(config: ModelConfig, ep: int) -> None:
    """Raise ConfigError where the experts cannot be shared equally."""
    if config.num_experts % ep:
        divisors = [str(size) for size in range(1, config.num_experts + 1) if config.num_experts % size == 0]
        raise ConfigError(
            f"parallel.ep={ep} does not divide model.num_experts={config.num_experts}; use one of {', '.join(divisors)}"
        )


def check_tensor(config: ModelConfig, tp: int) -> None:
    """Raise ConfigError where heads, columns or vocabulary cannot be shared equally."""
    for key in ("num_heads", "ffn_hidden_size", "vocab_size"):
        if getattr(config, key) % tp:
            raise ConfigError(f"parallel.tp={tp} does not divide model.{key}={getattr(config, key)}; change either")


def check_length(length: int, cp: int, tp: int) -> None:
    """Raise ConfigError where a sequence cannot be cut into equal chunks."""
    chunks = (2 * cp if cp > 1 else 1) * tp
    if length % chunks:
        raise ConfigError(
            f"train.sequence_length={length} does not divide into the {chunks} equal chunks of parallel.cp={cp} "
            f"(two per rank) and parallel.tp={tp}; use a multiple of {chunks}"
        )


def check_elastic(elastic_bits: int, parallel: ParallelConfig, sizes: MeshSizes, num_micro_batches: int) -> None:
    """Raise ConfigError where a layout cannot repeat the bits of N = ``elastic_bits`` data-parallel ranks.

    ``num_micro_batches`` are those of the global batch.
    """
    key = f"train.elastic_bits={elastic_bits}"
    if not elastic_bits:
        return
    if parallel.sharding != Sharding.fsdp:
        raise ConfigError(
            f"{key} needs parallel.sharding=fsdp: DeepSpeed adds gradients in an order of its own under "
            f"{parallel.sharding}; change either"
        )
    if parallel.accumulate == Accumulate.sharded:
        raise ConfigError(
            f"{key} adds the gradients of a rank's micro-batches first; set parallel.accumulate=unsharded, or "
            f"train.elastic_bits=0"
        )
    if elastic_bits & (elastic_bits - 1):
        raise ConfigError(f"{key} must be a power of two: gradients are added as a binary tree")
    if elastic_bits % sizes.data_ranks:
        raise ConfigError(
            f"{key} allows 1, 2, 4, … up to {elastic_bits} data-parallel ranks, not parallel.dp×fsdp="
            f"{sizes.data_ranks}; change either"
        )
    if num_micro_batches % elastic_bits:
        raise ConfigError(
            f"{key}: the {num_micro_batches} micro-batches of a step cannot be shared by {elastic_bits} ranks; make "
            f"train.global_batch_size a multiple of train.micro_batch_size × {elastic_bits}, or lower "
            f"train.elastic_bits"
        )
    for axis in ("pp", "cp", "tp", "ep"):
        if getattr(parallel, axis) == -1:
            raise ConfigError(
                f"{key} keeps parallel.{axis} at every size, and parallel.{axis}=-1 follows the size; give a number"
            )
    shared = sizes.cp * sizes.tp
    if sizes.ep % shared and shared % sizes.ep:
        raise ConfigError(
            f"{key} needs expert groups of whole data-parallel ranks, or several in one: parallel.ep={sizes.ep} and "
            f"the {shared} ranks of cp×tp do not divide each other; change either"
        )
