"""How FSDP2 shards a stack of experts over the ranks that hold the same ones (efsdp), so that their parts are equal."""

from __future__ import annotations

from dataclasses import replace

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from parallel.sizes import MeshSizes


def shard_dim(shape: tuple[int, ...], shards: int) -> int | None:
    """The dimension of a stack [experts, rows, columns] to shard; None if some ranks would get experts and others none.

    Whole experts where they divide by ``shards``, else rows, else columns; FSDP2 cannot cut these into unequal parts.
    Where nothing divides, whole experts if each rank gets one: FSDP2 gives every rank but the last the same number,
    rounded up, so that 8 experts over 5 ranks would be 2, 2, 2, 2 and 0.
    """
    for dim, size in enumerate(shape):
        if size % shards == 0:
            return dim
    each = -(-shape[0] // shards)
    return 0 if each * (shards - 1) < shape[0] else None


def stacks(config: ModelConfig, ep: int) -> list[tuple[int, int, int]]:
    """The shapes of one rank's stacks of one layer: gate and up, down."""
    experts, width, hidden = config.num_experts // ep, config.hidden_size, config.expert_hidden_size
    return [(experts, 2 * hidden, width), (experts, width, hidden)]


def largest_share(config: ModelConfig, sizes: MeshSizes) -> float:
    """The share of all experts' elements on the rank that has most; 1 / (ep × efsdp) where they divide."""
    held = 0
    for shape in stacks(config, sizes.ep):
        size = shape[shard_dim(shape, sizes.efsdp) or 0]
        held += -(-size // sizes.efsdp) * (shape[0] * shape[1] * shape[2] // size)
    return held / (config.num_experts * 3 * config.hidden_size * config.expert_hidden_size)


def check_expert_shards(config: ModelConfig, sizes: MeshSizes) -> None:
    """Raise ConfigError where some ranks would hold whole experts and others none, with what works."""
    if all(shard_dim(shape, sizes.efsdp) is not None for shape in stacks(config, sizes.ep)):
        return
    raise ConfigError(
        f"the {config.num_experts // sizes.ep} experts of a rank's group would be sharded over {sizes.efsdp} ranks "
        f"(parallel.fsdp × cp × tp / ep), some of which would get none, and model.hidden_size={config.hidden_size} and "
        f"model.expert_hidden_size={config.expert_hidden_size} cannot be cut into as many equal parts; "
        f"{_what_works(config, sizes)}"
    )


def _what_works(config: ModelConfig, sizes: MeshSizes) -> str:
    """The nearest layout of the same ranks: weights replicated over some of them, or larger expert groups."""
    for replicas in range(2, sizes.fsdp + 1):
        if sizes.fsdp % replicas == 0:
            fsdp, dp = sizes.fsdp // replicas, sizes.dp * replicas
            if _is_even(config, replace(sizes, fsdp=fsdp, dp=dp)):
                return f"use parallel.fsdp={fsdp} and parallel.dp={dp}"
    for ep in range(sizes.ep + 1, sizes.dense_shards + 1):
        if config.num_experts % ep == 0 and _is_even(config, replace(sizes, ep=ep)):
            return f"use parallel.ep={ep}"
    return "use another number of ranks"


def _is_even(config: ModelConfig, sizes: MeshSizes) -> bool:
    if sizes.dense_shards % sizes.ep:
        return False
    shapes = stacks(config, sizes.ep)
    return all(any(size % sizes.efsdp == 0 for size in shape) for shape in shapes)
