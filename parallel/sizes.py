"""The axes of the device mesh and their sizes: arithmetic, without torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import StrEnum

from longcat.errors import ConfigError
from parallel.config import ParallelConfig


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
    """(rank, local rank, world size) as torchrun and longcat train set them; one process without them."""
    return (
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
    )
