"""How a layout lies on nodes: which groups of ranks have members on several of them."""

from __future__ import annotations

from dataclasses import replace

from launch.slurm.options import SlurmOptions
from longcat.errors import ConfigError
from parallel.sizes import MeshSizes, resolve_sizes
from train.check import check_batch
from train.config import Config
from train.stages.configs import check_each_stage

TRAFFIC = {
    "tp": "every layer gathers and scatters its positions over them",
    "cp": "every attention gathers latents over them",
    "ep": "every layer sends its tokens to experts over them",
}


def ranks_per_node(options: SlurmOptions, config: Config) -> int:
    """Ranks on each node: run.num_processes, or one per GPU, or one.

    Raises:
        ConfigError: more ranks than GPUs.
    """
    ranks, gpus = config.run.num_processes, options.gpus_per_node
    if ranks == -1:
        return max(1, gpus)
    if gpus and ranks > gpus:
        raise ConfigError(
            f"run.num_processes={ranks} ranks have slurm.gpus_per_node={gpus} GPUs on a node; lower it to {gpus} or "
            f"leave it out"
        )
    return ranks


def check(options: SlurmOptions, config: Config) -> list[str]:
    """Check that ``config`` can train on the nodes, in every stage of `data.stages`.

    Returns what a person should know about the layout on them.

    Raises:
        ConfigError: layout, batch and number of ranks do not fit together.
    """
    check_meeting(options, config)
    local = ranks_per_node(options, config)
    sizes = resolve_sizes(config.parallel, options.nodes * local)
    check_each_stage(config, lambda resolved: check_batch(resolved, sizes))
    return [note(axis, sizes, local, spanned) for axis, spanned in spans(sizes, local).items() if spanned > 1]


def check_meeting(options: SlurmOptions, config: Config) -> None:
    """Refuse keys that would win over those by which the script lets the nodes meet.

    Raises:
        ConfigError: launch.nodes or launch.rendezvous.
    """
    launch = config.launch
    if launch.nodes not in (0, options.nodes):
        raise ConfigError(
            f"launch.nodes={launch.nodes} and slurm.nodes={options.nodes} differ; leave launch.nodes out: the script "
            f"sets it"
        )
    if launch.rendezvous:
        raise ConfigError(
            f"launch.rendezvous={launch.rendezvous}: Slurm chooses the nodes; leave it out: the script sets it at each "
            f"start"
        )


def spans(sizes: MeshSizes, local: int) -> dict[str, int]:
    """Axis → the most nodes of ``local`` ranks that one of its groups has members on.

    Ranks are numbered with tp innermost, then cp; an expert group is ep ranks in a row (`parallel.mesh.Axis`).
    """
    world = sizes.pp * sizes.dp * sizes.dense_shards
    groups = {
        "tp": [range(first, first + sizes.tp) for first in range(0, world, sizes.tp)],
        "cp": [
            range(first + offset, first + sizes.cp * sizes.tp, sizes.tp)
            for first in range(0, world, sizes.cp * sizes.tp)
            for offset in range(sizes.tp)
        ],
        "ep": [range(first, first + sizes.ep) for first in range(0, world, sizes.ep)],
    }
    return {axis: max(len({rank // local for rank in group}) for group in found) for axis, found in groups.items()}


def note(axis: str, sizes: MeshSizes, local: int, spanned: int) -> str:
    """One sentence on an axis that leaves a node, with what would keep it inside."""
    size = getattr(sizes, axis)
    inside = [
        each
        for each in range(1, local + 1)
        if size % each == 0 and spans(replace(sizes, **{axis: each}), local)[axis] == 1
    ]
    best = inside[-1] if inside else 1
    return (
        f"parallel.{axis}={size} spans {spanned} nodes of {local} ranks: {TRAFFIC[axis]}, at the network's speed; "
        f"parallel.{axis}={best} stays inside a node"
    )
