"""What is refused before ranks start: layout, batch sizes, memory, run folder, missing corpora; without torch."""

from __future__ import annotations

import os

from longcat.errors import ConfigError
from parallel.capacity import check_memory
from parallel.environment import check_determinism, check_streams, count_gpus, prepare_environment
from parallel.layout import BatchShape, check_elastic, check_layout
from parallel.sizes import MeshSizes, number_in_environment, resolve_sizes
from train.config import Config
from train.data.corpus import find_pair
from train.run_dir.folder import check_folder, record_refusal
from train.stages.configs import check_each_stage


def check(config: Config, world_size: int) -> None:
    """Check layout, batch sizes, memory and run folder before ranks start.

    Raises:
        ConfigError: with the key to change.
    """
    check_sizes(config, world_size)
    check_folder(config)


def check_corpora(config: Config) -> None:
    """Check that the files of the corpora are there, before torch is imported; the ranks look into them.

    Raises:
        ConfigError: one is missing; exit.json then has the message.
    """
    try:
        for prefix in config.data.paths:
            find_pair(prefix)
    except ConfigError as error:
        record_refusal(config.run.folder, error)
        raise


def check_sizes(config: Config, world_size: int, local_ranks: int | None = None) -> tuple[float, float]:
    """Check what needs no file, in every stage of `data.stages`.

    Args:
        local_ranks: ranks on this machine; None: those that torchrun or `longcat train` names, else all.

    Returns the bytes that ranks of this machine need at least, and what it has.

    Raises:
        ConfigError: with the key to change.
    """
    prepare_environment(os.environ, config.train.deterministic)  # before the first question to CUDA
    sizes = resolve_sizes(config.parallel, world_size)
    local = local_ranks or number_in_environment("LOCAL_WORLD_SIZE", world_size)
    found = check_each_stage(config, lambda resolved: _check_memory(resolved, sizes, local))
    if config.train.deterministic:
        check_determinism(os.environ, count_gpus() > 0, config.parallel.compile)
    check_streams(os.environ, count_gpus() > 0, config.overlap.experts_stream)
    return max(found)


def _check_memory(config: Config, sizes: MeshSizes, local_ranks: int) -> tuple[float, float]:
    """As `check_sizes`, for the configuration of one stage."""
    batch = check_batch(config, sizes)
    return check_memory(config.model, config.parallel, sizes, batch, local_ranks)


def check_batch(config: Config, sizes: MeshSizes) -> BatchShape:
    """The batch of each data rank in one stage; raises ConfigError where layout and batch sizes do not fit together."""
    config.validate_world(sizes.data_ranks)
    num_micro_batches = config.train.global_batch_size // config.train.micro_batch_size
    check_elastic(config.train.elastic_bits, config.parallel, sizes, num_micro_batches)
    batch = batch_shape(config, sizes)
    check_layout(config.model, config.parallel, sizes, batch.length, batch.num_micro_batches)
    return batch


def batch_shape(config: Config, sizes: MeshSizes) -> BatchShape:
    """The batch that each data rank reads for a step, or for one of its virtual ranks (`train.elastic_bits`)."""
    train = config.train
    num_micro_batches = train.global_batch_size // train.micro_batch_size // (train.elastic_bits or sizes.data_ranks)
    return BatchShape(num_micro_batches, train.micro_batch_size, train.sequence_length)
