"""Seconds of messages on a cluster's links: which ranks of a group share a node, and what that does to a collective."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from launch.plan.cluster import Cluster
from parallel.mesh import MeshSizes


class TrafficPattern(StrEnum):
    """How a group's messages use links."""

    all_to_all = "all_to_all"  # as many bytes to each rank
    ring = "ring"  # all-gather, reduce-scatter: a node receives each byte once; on CPUs each rank does
    neighbour = "neighbour"  # to one rank


@dataclass(frozen=True)
class Group:
    """Ranks that communicate: ``size`` of them, ``stride`` apart in rank order."""

    size: int
    stride: int

    def inside(self, cluster: Cluster) -> int:
        """How many of them a node has."""
        return min(self.size, max(1, cluster.gpus_per_node // self.stride))


def group_of(axis: str, sizes: MeshSizes) -> Group:
    """The group of a mesh axis; neighbours on the innermost axis sit next to each other (`parallel.mesh.Axis`)."""
    return {
        "tp": Group(sizes.tp, 1),
        "cp": Group(sizes.cp * sizes.tp, 1),
        "ep": Group(sizes.ep, 1),
        "fsdp": Group(sizes.dense_shards, 1),
        "efsdp": Group(sizes.efsdp, sizes.ep),
        "dp": Group(sizes.dp, sizes.dense_shards),
        "pp": Group(sizes.pp, sizes.dp * sizes.dense_shards),
    }[axis]


def seconds(cluster: Cluster, group: Group, pattern: TrafficPattern, num_bytes: float, count: float = 1.0) -> float:
    """Seconds in which a rank sends ``num_bytes`` to others of its group, in ``count`` messages."""
    if group.size == 1 or not count:
        return 0.0
    here = group.inside(cluster)
    inside, network = cluster.inside * cluster.links_reached, cluster.network * cluster.links_reached
    messages = count * (1 if cluster.on_gpu else group.size - 1)  # gloo's processes wait for one peer after the other
    latency = messages * (cluster.inside_latency if here == group.size else cluster.network_latency)
    if here == group.size:
        return num_bytes / inside + latency
    # On CPUs a rank sends to each other one (parallel/collectives/point_to_point.py)
    if pattern == TrafficPattern.all_to_all or (pattern == TrafficPattern.ring and not cluster.on_gpu):
        others = group.size - 1
        return (
            max(num_bytes * (here - 1) / others / inside, num_bytes * (others - here + 1) / others / network) + latency
        )
    if pattern == TrafficPattern.ring:  # the node's ranks share what comes over the network
        return max(num_bytes * (here > 1) / inside, num_bytes / here / network) + latency
    return num_bytes / network + latency


def where(cluster: Cluster, group: Group) -> str:
    """The link that limits a group."""
    return "in a node" if group.inside(cluster) == group.size else "network"
