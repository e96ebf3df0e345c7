"""The axes of the device mesh and their sizes: arithmetic, without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum

from longcat.errors import ConfigError
from parallel.config import ParallelConfig

MEETING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # environment variables through which ranks meet
LAST_PORT = 65535


class Axis(StrEnum):
    """Axes of the mesh, outermost first; neighbours on the innermost axis sit next to each other in rank order.

    For the experts the ranks of fsdp × cp × tp are refolded into efsdp × ep, ep innermost: an expert-parallel group can
    span context- and tensor-parallel ranks.
    """

    PP = "pp"  # stages of layers
    DP = "dp"  # replicates the weights
    FSDP = "fsdp"  # shards the weights
    CP = "cp"  # shards the positions of a sequence
    TP = "tp"  # shards heads, FFN columns, vocabulary, and the positions between them


@dataclass(frozen=True)
class MeshSizes:
    """A mesh's sizes with every -1 filled in."""

    pp: int
    dp: int
    fsdp: int
    cp: int
    tp: int
    ep: int

    @property
    def efsdp(self) -> int:
        """Ranks over which each expert's weights are sharded."""
        return self.fsdp * self.cp * self.tp // self.ep

    @property
    def data_ranks(self) -> int:
        """The number of ranks that read different samples."""
        return self.dp * self.fsdp

    @property
    def dense_shards(self) -> int:
        """Ranks over which a dense weight that tensor parallelism has not split is sharded."""
        return self.fsdp * self.cp * self.tp


def resolve_sizes(config: ParallelConfig, world_size: int) -> MeshSizes:
    """Fill in -1 and check that the axes multiply to ``world_size`` ranks.

    Raises:
        ConfigError: they do not, or ep does not divide the ranks that experts can use.
    """
    config.validate()
    sizes = {axis: getattr(config, axis.value) for axis in Axis}
    known = 1
    for size in sizes.values():
        known *= max(size, 1)
    if world_size % known or (known != world_size and -1 not in sizes.values()):
        given = " × ".join(f"parallel.{axis.value}={size}" for axis, size in sizes.items() if size != 1)
        raise ConfigError(
            f"{given} does not give the {world_size} ranks that were started; set one axis to -1, "
            f"or start {known} ranks"
        )
    filled = {axis: world_size // known if size == -1 else size for axis, size in sizes.items()}
    folded = filled[Axis.FSDP] * filled[Axis.CP] * filled[Axis.TP]
    ep = folded if config.ep == -1 else config.ep
    if folded % ep:
        divisors = [str(size) for size in range(1, folded + 1) if folded % size == 0]
        raise ConfigError(
            f"parallel.ep={ep} does not divide the {folded} ranks of fsdp×cp×tp; use {', '.join(divisors)}, "
            f"or raise parallel.fsdp"
        )
    return MeshSizes(**{axis.value: size for axis, size in filled.items()}, ep=ep)


def world_from_environment() -> tuple[int, int, int]:
    """(rank, local rank, world size) as torchrun and longcat train set them; one process without them.

    Raises:
        ConfigError: a variable is no number, or they contradict each other.
    """
    rank, local_rank, world_size = (
        number_in_environment(name, default) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))
    )
    missing = [name for name in MEETING if name not in os.environ]
    if missing and world_size > 1:
        raise ConfigError(
            f"WORLD_SIZE={world_size} in the environment makes this one of {world_size} ranks, and there is no "
            f"{' and no '.join(missing)}; unset WORLD_SIZE, or start the ranks with torchrun, which sets all of them"
        )
    port = os.environ.get("MASTER_PORT", "")
    if world_size > 1 and not (port.isdecimal() and int(port) <= LAST_PORT):
        raise ConfigError(f"MASTER_PORT={port} in the environment must be a port, from 0 to {LAST_PORT}; correct it")
    if rank >= world_size:
        raise ConfigError(
            f"RANK={rank} and WORLD_SIZE={world_size} in the environment: ranks are 0 to {world_size - 1}; unset both, "
            f"or start all ranks with torchrun"
        )
    return rank, local_rank, world_size


def number_in_environment(name: str, default: int) -> int:
    """A whole number that torchrun sets; raises ConfigError for anything else."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal() or (name.endswith("WORLD_SIZE") and int(text) == 0):
        raise ConfigError(f"{name}={text} in the environment must be a number, as torchrun sets it; unset it")
    return int(text)
