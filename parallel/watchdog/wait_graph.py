"""Which rank waits for which: from one waiting rank along its collectives to the end of the chain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

Node = tuple[object, ...]  # a collective that ranks wait in, or a rank that waits in none


class Waiter(Protocol):
    """What the graph needs to know of a rank."""

    @property
    def is_waiting(self) -> bool: ...

    @property
    def ranks(self) -> str:
        """Ranks of the collective, as `encode_ranks` writes them; "" is all."""
        ...

    @property
    def call(self) -> Node:
        """Equal on ranks in the same call of a collective."""
        ...


class WaitGraph:
    """The collectives that ranks wait in, and which ranks each of them lacks."""

    def __init__(self, heartbeats: Mapping[int, Waiter]) -> None:
        self.heartbeats = heartbeats
        self.node = {rank: one.call if one.is_waiting else (rank,) for rank, one in heartbeats.items()}
        self.present: dict[Node, set[int]] = {}  # ranks that have entered it
        for rank, node in self.node.items():
            self.present.setdefault(node, set()).add(rank)
        self._missing: dict[Node, set[int]] = {}

    def missing(self, node: Node) -> set[int]:
        """Ranks that those in the collective wait for."""
        if node not in self._missing:
            self._missing[node] = self._find_missing(node)
        return self._missing[node]

    def _find_missing(self, node: Node) -> set[int]:
        heartbeat = self.heartbeats[next(iter(self.present[node]))]
        if not heartbeat.is_waiting:
            return set()
        ranks = decode_ranks(heartbeat.ranks) & self.heartbeats.keys() if heartbeat.ranks else set(self.heartbeats)
        return ranks - self.present[node]

    def successors(self, node: Node) -> dict[Node, int]:
        """The nodes that a node waits for, each with a rank through which it does.

        A collective that lacks no rank is about to end, and delays none.
        """
        found = {self.node[rank]: rank for rank in sorted(self.missing(node), reverse=True)}
        return {
            other: rank for other, rank in found.items() if not self.heartbeats[rank].is_waiting or self.missing(other)
        }

    def reachable(self, start: Node, successors: Callable[[Node], Iterable[Node]]) -> dict[Node, Node]:
        """Every node that can be reached from ``start``, with its predecessor on a shortest path."""
        predecessors, queue = {start: start}, [start]
        for node in queue:
            for other in successors(node):
                if other not in predecessors:
                    predecessors[other] = node
                    queue.append(other)
        return predecessors

    def cycle(self, start: Node) -> set[Node]:
        """Nodes that are reached from ``start`` and lead only to each other."""
        while True:
            reached = self.reachable(start, self.successors)
            reverse: dict[Node, list[Node]] = {}
            for node in reached:
                for other in self.successors(node):
                    reverse.setdefault(other, []).append(node)
            returning = self.reachable(start, lambda node, reverse=reverse: reverse.get(node, ()))  # type: ignore[misc]
            further = next((node for node in reached if node not in returning), None)
            if further is None:
                return set(reached)
            start = further


def wait_ends(start: int, heartbeats: Mapping[int, Waiter]) -> list[tuple[int, ...]]:
    """For which ranks ``start``, which waits, waits in the end: each rank that works on a path from it.

    Where all on the path wait: the ranks of the one cycle that they lead to.
    """
    graph = WaitGraph(heartbeats)
    reached = graph.reachable(graph.node[start], graph.successors)
    working = sorted(rank for node in reached for rank in graph.present[node] if not heartbeats[rank].is_waiting)
    if working:
        return [(rank,) for rank in working]
    return [tuple(sorted(rank for node in graph.cycle(graph.node[start]) for rank in graph.present[node]))]


def ranks_reached(start: int, heartbeats: Mapping[int, Waiter]) -> set[int]:
    """The ranks in the call of ``start``, which waits, and those that it waits for, through others too."""
    graph = WaitGraph(heartbeats)
    return {rank for node in graph.reachable(graph.node[start], graph.successors) for rank in graph.present[node]}


def wait_path(start: int, end: int, heartbeats: Mapping[int, Waiter]) -> tuple[int, ...]:
    """Ranks between the two on the shortest path from ``start``, which waits."""
    graph = WaitGraph(heartbeats)
    predecessors, node = graph.reachable(graph.node[start], graph.successors), graph.node[end]
    ranks = []
    while predecessors[node] != node:
        ranks.append(graph.successors(predecessors[node])[node])
        node = predecessors[node]
    return tuple(reversed(ranks[1:]))


def encode_ranks(ranks: Iterable[int]) -> str:
    """Ranks as ranges, `0-6:2,9`: a mesh's group of thousands is a few of them."""
    ranks, ranges = sorted(ranks), []
    while ranks:
        step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
        count = 1
        while count < len(ranks) and ranks[count] - ranks[count - 1] == step:
            count += 1
        ranges.append(f"{ranks[0]}-{ranks[count - 1]}:{step}" if count > 1 else f"{ranks[0]}")
        ranks = ranks[count:]
    return ",".join(ranges)


def decode_ranks(text: str) -> set[int]:
    """The ranks that `encode_ranks` wrote."""
    ranks: set[int] = set()
    for part in text.split(","):
        first, _, rest = part.partition("-")
        last, _, step = rest.partition(":")
        ranks.update(range(int(first), int(last or first) + 1, int(step or 1)))
    return ranks
