"""How many nodes a run can use: the layout as configured, and with fewer data-parallel ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy

from longcat.errors import ConfigError
from parallel.mesh import MeshSizes, resolve_sizes
from train.check import check_sizes
from train.config import Config


def layouts(config: Config, nodes: int, processes: int) -> Mapping[int, tuple[str, ...]]:
    """Numbers of nodes, largest first → the overrides with which the run fits them.

    The first is ``nodes`` as configured. With `launch.shrink` follow those with fewer data-parallel ranks that divide
    the global batch and pass the checks of layout and memory; the other axes and the batch stay.
    """
    found: dict[int, tuple[str, ...]] = {nodes: ()}
    if not config.launch.shrink:
        return found
    sizes = resolve_sizes(config.parallel, nodes * processes)
    for count in range(nodes - 1, 0, -1):
        data_ranks, rest = divmod(count * processes, sizes.pp * sizes.cp * sizes.tp)
        for dp, fsdp in [] if rest else splits(data_ranks, sizes):
            smaller = deepcopy(config)
            smaller.parallel.dp, smaller.parallel.fsdp, smaller.parallel.ep = dp, fsdp, sizes.ep
            try:
                check_sizes(smaller, count * processes)
            except ConfigError:
                continue
            found[count] = f"parallel.dp={dp}", f"parallel.fsdp={fsdp}", f"parallel.ep={sizes.ep}"
            break
    return found


def splits(data_ranks: int, sizes: MeshSizes) -> Iterator[tuple[int, int]]:
    """(dp, fsdp) with ``data_ranks`` in all: fewer replicas first, else as much sharding as there was, then less."""
    shards = [fsdp for fsdp in range(data_ranks, 0, -1) if data_ranks % fsdp == 0]
    for fsdp in sorted(shards, key=lambda fsdp: (fsdp != sizes.fsdp, fsdp > sizes.fsdp, -fsdp)):
        yield data_ranks // fsdp, fsdp
