"""The memory that a run needs at least, by formula, against what the machine has; nothing is allocated."""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from longcat.parts import ModelPart
from parallel.config import Offload, ParallelConfig
from parallel.environment import count_gpus
from parallel.layout import BatchShape
from parallel.memory import mib, state_bytes, step_bytes
from parallel.pipeline.stages import num_stages, split, stages_of
from parallel.sizes import MeshSizes, world_from_environment

PROCESS_BYTES = 256 << 20  # of a Python process with torch
TOKEN_BYTES = 8 + 8 + 1  # id, label and whether it counts
EXCHANGED = 2  # bytes of a bfloat16 number, the smallest that layers exchange
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Need:
    """Bytes of one rank; a lower bound.

    The backward of the only micro-batch frees a layer's activations while it adds its gradients. With several, the
    gradients of one are there when the next one's activations are.
    """

    held: float  # weights and moments
    gradients: float  # of the shards, or what micro-batches accumulate
    gathered: float  # unsharded weights that are in memory together
    activations: float  # the inputs of the layers of one micro-batch, which even recompute=full keeps
    tokens: float  # of a step
    several: bool  # micro-batches

    @property
    def state(self) -> float:
        return self.held + self.gradients

    @property
    def total(self) -> float:
        both = self.gradients + self.activations if self.several else max(self.gradients, self.activations)
        return self.held + both + self.gathered + self.tokens

    def __str__(self) -> str:
        beside = f"at least {mib(self.activations + self.tokens)} of activations and tokens"
        gathered = f"{mib(self.gathered)} of gathered weights, " if self.gathered else ""
        return f"{mib(self.state)} of state, {gathered}{beside}"


def needs(
    model: ModelConfig, parallel: ParallelConfig, sizes: MeshSizes, batch: BatchShape, on_gpu: bool
) -> list[Need]:
    """What a rank of each pipeline stage needs, in the memory of its GPU or of the machine."""
    parts: list[list[ModelPart | None]] = [[None]]
    if sizes.pp > 1:
        every = split(model, num_stages(parallel.schedule, sizes.pp), batch.length)
        parts = [[every[stage] for stage in stages_of(parallel.schedule, sizes.pp, rank)] for rank in range(sizes.pp)]
    positions = batch.sequences * batch.length / (sizes.cp * sizes.tp)
    tokens = float(batch.num_micro_batches * batch.sequences * batch.length * TOKEN_BYTES)
    found = []
    for of_rank in parts:
        state = state_bytes(model, sizes, parallel.sharding, of_rank)
        step = step_bytes(model, sizes, parallel, of_rank, batch.num_micro_batches, EXCHANGED)
        held, gradients = state.weights + state.moments, max(state.gradients, step.accumulated_gradients)
        if parallel.offload != Offload.none:  # the rest may be in host memory or in files
            held, gradients = 0.0, 0.0 if on_gpu else state.gradients
        layers = sum(model.num_layers if part is None else part.last - part.first for part in of_rank)
        activations = positions * layers * model.hidden_size * EXCHANGED
        several = batch.num_micro_batches > 1
        found.append(Need(held, gradients, step.gathered_weights, activations, tokens, several))
    return found


def check_memory(
    model: ModelConfig, parallel: ParallelConfig, sizes: MeshSizes, batch: BatchShape, local_ranks: int
) -> tuple[float, float]:
    """(bytes that this machine's ranks need at least, bytes that it has); on GPUs those of one rank and of its own GPU.

    Raises:
        ConfigError: the machine has less, or it has GPUs with which CUDA does not start.
    """
    on_gpu = count_gpus() > 0
    each = needs(model, parallel, sizes, batch, on_gpu)
    if on_gpu:
        import torch

        from parallel.mesh import own_gpu

        if not torch.cuda.is_available():  # the driver counts its GPUs, and torch can use none
            raise ConfigError(
                f"CUDA does not start on this machine's GPUs: the driver may be too old for torch {torch.__version__}; "
                f"install a newer driver or another torch, or hide the GPUs with CUDA_VISIBLE_DEVICES=''"
            )
        needed = max(need.total for need in each)
        device = own_gpu(world_from_environment()[1], torch.cuda.device_count())
        has = float(torch.cuda.get_device_properties(device).total_memory)
        where, ranks = "its GPU", "a rank"
    else:
        needed = (sum(need.total for need in each) / len(each) + PROCESS_BYTES) * local_ranks
        has = float(host_memory())
        where, ranks = "this machine", f"{local_ranks} rank{'s' if local_ranks > 1 else ''} on it"
    if needed > has:
        largest = max(each, key=lambda need: need.total)
        raise ConfigError(
            f"model={model.name}: {ranks} would need at least {mib(needed)} of memory and {where} has {mib(has)} "
            f"(a rank: {largest}); use a smaller model or batch, or more machines"
        )
    return needed, has


def host_memory() -> int:
    """Bytes of memory that this process may use: the machine's with its swap, or the limit of its container."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") + swap()]
    for path in CGROUP_LIMITS:
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):
            continue  # not this kind of container, or "max"
    limits += [limit for limit in resource.getrlimit(resource.RLIMIT_AS) if limit != resource.RLIM_INFINITY]
    return min(limits)


def swap() -> int:
    """Bytes of swap (Linux)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("SwapTotal:")), 0)
