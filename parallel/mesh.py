"""The device mesh: names, sizes and groups of the ranks, checked once."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from longcat.errors import ConfigError, MissingRanksError, SilentStoreError
from parallel.config import ParallelConfig
from parallel.environment import raise_descriptor_limit
from parallel.groups import mesh_groups_of_members
from parallel.sizes import Axis, MeshSizes, resolve_sizes, world_from_environment
from parallel.torch_internals import flatten_mesh, unflatten_mesh
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import wait_span


@dataclass(frozen=True)
class Topology:
    """This rank's coordinates, process groups and device.

    Only this file makes process groups. ``mesh`` has the axes of `Axis`; ``dense`` shards weights that tensor
    parallelism has split (over fsdp × cp), ``replicated`` those it has not (over fsdp × cp × tp, so that summing
    gradients over them sums over tp too), ``experts`` is dp × efsdp × ep. With dp > 1 each has the axis dp in front.
    """

    mesh: DeviceMesh
    dense: DeviceMesh
    replicated: DeviceMesh
    experts: DeviceMesh
    shared: DeviceMesh  # cp × tp: the ranks that share a micro-batch
    expert_exchange: dist.ProcessGroup  # second groups of the ranks of ep and of cp × tp, so that what a layer
    context_exchange: dist.ProcessGroup  # waits for does not queue behind sums of gradients
    sizes: MeshSizes
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def coordinate(self, axis: Axis) -> int:
        return self.mesh.get_local_rank(axis.value)  # a slice of the mesh would list its ranks again

    def group(self, axis: Axis) -> dist.ProcessGroup:
        return self.mesh.get_group(axis.value)

    @property
    def data_ranks(self) -> int:
        """The number of ranks that read different samples."""
        return self.sizes.data_ranks

    @property
    def data_rank(self) -> int:
        return self.coordinate(Axis.DP) * self.sizes.fsdp + self.coordinate(Axis.FSDP)

    @property
    def reads_first(self) -> bool:
        """Whether this rank is the first of those that read the same samples."""
        return all(self.coordinate(axis) == 0 for axis in (Axis.PP, Axis.CP, Axis.TP))

    @property
    def holds_first_shards(self) -> bool:
        """Whether this rank is the first of its pipeline stage."""
        return all(self.coordinate(axis) == 0 for axis in Axis if axis is not Axis.PP)

    @property
    def holds_first_replica(self) -> bool:
        """Whether sums over unique shards include this rank's shards."""
        return self.coordinate(Axis.DP) == 0


def make_topology(
    sizes: MeshSizes, rank: int, world_size: int, device: torch.device, timeout: timedelta | None = None
) -> Topology:
    """Create the mesh and the meshes derived from it, on GPUs with NCCL alone. A collective of all ranks.

    Args:
        timeout: of making the groups and of their collectives; None for torch's, half an hour with gloo.
    """
    lengths = tuple(getattr(sizes, axis.value) for axis in Axis)
    with mesh_groups_of_members("nccl" if device.type == "cuda" else None, timeout):
        mesh = init_device_mesh(device.type, lengths, mesh_dim_names=tuple(axis.value for axis in Axis))
        dense = flatten_mesh(mesh[Axis.FSDP, Axis.CP], "fsdp_cp")
        replicated = flatten_mesh(mesh[Axis.FSDP, Axis.CP, Axis.TP], "fsdp_cp_tp")
        experts = unflatten_mesh(replicated, 0, (sizes.efsdp, sizes.ep), ("efsdp", "ep"))
        shared = flatten_mesh(mesh[Axis.CP, Axis.TP], "cp_tp")
    return Topology(
        mesh=mesh,
        dense=dense,
        replicated=replicated,
        experts=experts,
        shared=shared,
        expert_exchange=_separate_group(experts["ep"], "expert exchange", timeout),
        context_exchange=_separate_group(shared, "context exchange", timeout),
        sizes=sizes,
        rank=rank,
        world_size=world_size,
        device=device,
    )


def _separate_group(mesh: DeviceMesh, what: str, timeout: timedelta | None) -> dist.ProcessGroup:
    """A second group of a mesh's ranks, on GPUs with NCCL streams of high priority. A collective of these ranks.

    Meshes with the same ranks share a group, and collectives in one group wait for each other.
    """
    if mesh.size() == 1:
        return mesh.get_group()
    with wait_span(Event(SpanKind.MESH_GROUPS)):
        return _second_group(mesh, what, timeout)


def _second_group(mesh: DeviceMesh, what: str, timeout: timedelta | None) -> dist.ProcessGroup:
    options = None
    if mesh.device_type == "cuda":
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    return dist.new_group(
        mesh.mesh.flatten().tolist(),
        backend="gloo" if options is None else "nccl",
        pg_options=options,
        use_local_synchronization=True,
        group_desc=what,
        timeout=timeout,
    )


BACKGROUND = "background"  # describes a group whose collectives no step waits for


def background_group(timeout_seconds: float) -> dist.ProcessGroup:
    """A gloo group of all ranks for a background thread, with its own timeout. A collective.

    On one group, the collectives of two threads could start in another order on each rank.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds), group_desc=BACKGROUND)


def own_gpu(local_rank: int, visible: int) -> torch.device:
    """The GPU of a process that sees ``visible`` of them: its own alone, or those of all processes of its machine.

    Raises:
        ConfigError: it sees several, but none for this process.
    """
    if visible == 1:  # a launcher has hidden the others
        return torch.device("cuda", 0)
    if local_rank >= visible:
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own: this process sees {visible}; start fewer processes on the "
            f"machine, or let each see one GPU (CUDA_VISIBLE_DEVICES)"
        )
    return torch.device("cuda", local_rank)


def incarnation() -> str:
    """A prefix for the keys of this start of all ranks: a launcher's store keeps those of earlier starts."""
    return "/".join(os.environ.get(f"TORCHELASTIC_{name}", "") for name in ("RUN_ID", "RESTART_COUNT"))


HERE = "here/"  # + rank: it is about to form groups
MARGIN_SECONDS = 2.0  # beyond parallel.timeout_seconds, for torch's own limit to come first where it has one
T = TypeVar("T")


def ask_store(call: Callable[[], T], seconds: float, waits: int = 1) -> T:
    """The result of requests to the ranks' store. torch waits without a limit for answers to some of them.

    Args:
        waits: the number of other waits, of up to ``seconds`` each, that the requests contain.

    Raises:
        SilentStoreError: it takes longer; the requests are left behind in a thread.
    """
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True, name="ask_store").start()
    try:
        return outcome.result(waits * seconds + MARGIN_SECONDS)
    except TimeoutError:
        if outcome.done():
            raise
        address = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT', '')}"
        raise SilentStoreError(
            f"the store of the ranks at {address} did not answer for {seconds:g} s (parallel.timeout_seconds); "
            f"look at its process and machine, or give a free port if another program listens there"
        ) from None


def missing_keys(store: dist.Store, keys: list[str]) -> list[str]:
    """Those of ``keys`` that the store does not have, by few requests where few are missing."""
    if not keys or store.check(keys):
        return []
    if len(keys) == 1:
        return keys
    half = len(keys) // 2
    return missing_keys(store, keys[:half]) + missing_keys(store, keys[half:])


def connect(config: ParallelConfig, on_meeting: Callable[[], None] = lambda: None) -> Topology:
    """Create the process group and the mesh: NCCL and gloo on GPUs, gloo alone on CPUs.

    Args:
        on_meeting: called on each rank when all have met, before the mesh's groups are made: a lost rank or store
            would keep those waiting in this thread.

    Raises:
        ConfigError: this rank has no GPU, or the environment contradicts itself.
        MissingRanksError: other ranks did not come in time.
        SilentStoreError: the store through which they meet does not answer in time.
    """
    rank, local_rank, world_size = world_from_environment()
    sizes = resolve_sizes(config, world_size)
    timeout = timedelta(seconds=config.timeout_seconds)
    cuda = torch.cuda.is_available()
    device = own_gpu(local_rank, torch.cuda.device_count()) if cuda else torch.device("cpu")
    raise_descriptor_limit(sizes, world_size, cuda, os.environ)
    if cuda:
        torch.cuda.set_device(device)
    if world_size == 1:  # it needs no store
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    else:

        def arrive() -> dist.Store:
            store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
            store.set_timeout(timeout)
            own = dist.PrefixStore(incarnation(), store)
            own.set(f"{HERE}{rank}", "")
            return own

        def form_group() -> None:
            if cuda:
                torch.cuda.set_device(device)  # it holds for one thread
            backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
            dist.init_process_group(backend, timeout=timeout, store=own, rank=rank, world_size=world_size)

        own = ask_store(arrive, config.timeout_seconds)
        try:
            ask_store(form_group, config.timeout_seconds, waits=2)  # for ranks to come, and to connect to each other
        except dist.DistError as error:
            expected = [f"{HERE}{number}" for number in range(world_size)]
            missing = ask_store(lambda: missing_keys(own, expected), config.timeout_seconds)
            if not missing:
                raise
            ranks = [int(key.removeprefix(HERE)) for key in missing]
            raise MissingRanksError(
                f"rank {', '.join(map(str, ranks[:8]))}{', …' * (len(ranks) > 8)} of {world_size} did not start within "
                f"{config.timeout_seconds:g} s (parallel.timeout_seconds); look at its machine",
                {"kind": "missing", "ranks": [{"rank": number} for number in ranks]},
            ) from error
    on_meeting()
    with wait_span(Event(SpanKind.MESH_GROUPS)):
        return make_topology(sizes, rank, world_size, device, timeout)
