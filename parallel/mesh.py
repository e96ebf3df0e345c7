"""The device mesh: names, sizes and groups of the ranks, checked once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longcat.errors import ConfigError


class Axis(StrEnum):
    """Axes of the mesh, outermost first. ``dp`` replicates the weights, ``fsdp`` shards them."""

    DP = "dp"
    FSDP = "fsdp"


@dataclass
class ParallelConfig:
    """Sizes of the mesh axes; -1 takes the ranks that are left over (one axis at most)."""

    dp: int = 1
    fsdp: int = -1
    reshard_after_forward: bool = True  # False keeps gathered weights until the backward: faster, more memory
    timeout_seconds: float = 600.0  # a collective that takes longer ends the run

    def validate(self) -> None:
        for name in (axis.value for axis in Axis):
            size = getattr(self, name)
            if size != -1 and size < 1:
                raise ConfigError(f"parallel.{name}={size} must be at least 1, or -1 for the ranks left over")
        if self.dp == -1 and self.fsdp == -1:
            raise ConfigError("parallel.dp and parallel.fsdp are both -1; only one axis can take the ranks left over")
        if not self.timeout_seconds > 0:
            raise ConfigError(f"parallel.timeout_seconds={self.timeout_seconds} must be above 0")


def resolve_sizes(config: ParallelConfig, world_size: int) -> dict[Axis, int]:
    """Fill in -1 and check that the axes multiply to ``world_size`` ranks."""
    config.validate()
    sizes = {axis: getattr(config, axis.value) for axis in Axis}
    known = 1
    for size in sizes.values():
        known *= max(size, 1)
    names = "×".join(f"parallel.{axis.value}" for axis in Axis)
    if world_size % known or (known != world_size and -1 not in sizes.values()):
        given = "×".join(str(size) for size in sizes.values())
        raise ConfigError(
            f"{names}={given} does not give the {world_size} ranks that were started; "
            f"set one axis to -1, or start {known} ranks"
        )
    return {axis: world_size // known if size == -1 else size for axis, size in sizes.items()}


@dataclass(frozen=True)
class Topology:
    """This rank's place. ``device`` is where its tensors live."""

    mesh: DeviceMesh
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def size(self, axis: Axis) -> int:
        return self.mesh[axis.value].size()

    def coordinate(self, axis: Axis) -> int:
        return self.mesh[axis.value].get_local_rank()

    @property
    def data_ranks(self) -> int:
        """How many ranks read different samples."""
        return self.size(Axis.DP) * self.size(Axis.FSDP)

    @property
    def data_rank(self) -> int:
        return self.coordinate(Axis.DP) * self.size(Axis.FSDP) + self.coordinate(Axis.FSDP)

    @property
    def holds_first_replica(self) -> bool:
        """Whether this rank's shards are the ones that sums over unique shards count."""
        return self.coordinate(Axis.DP) == 0


def world_from_environment() -> tuple[int, int, int]:
    """(rank, local rank, world size) as torchrun and the elastic agent set them; one process without them."""
    return (
        int(os.environ.get("RANK", "0")),
        int(os.environ.get("LOCAL_RANK", "0")),
        int(os.environ.get("WORLD_SIZE", "1")),
    )


def connect(config: ParallelConfig) -> Topology:
    """Make the process group and the mesh: NCCL beside gloo on GPUs, gloo alone on CPUs."""
    rank, local_rank, world_size = world_from_environment()
    sizes = resolve_sizes(config, world_size)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda and local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own: this machine has {torch.cuda.device_count()}; start fewer "
            f"processes on it"
        )
    if cuda:
        torch.cuda.set_device(device)
    if "MASTER_ADDR" not in os.environ:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(seconds=config.timeout_seconds)
        )
    mesh = init_device_mesh(device.type, tuple(sizes.values()), mesh_dim_names=tuple(axis.value for axis in sizes))
    return Topology(mesh, rank, world_size, device)
