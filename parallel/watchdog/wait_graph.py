"""Who waits for whom: from one waiting rank along the exchanges to whoever stands at the end of the chain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

Node = tuple[object, ...]  # an exchange that ranks wait in, or a rank that waits in none


class Waits(Protocol):
    """What the walk has to know of a rank."""

    @property
    def waits(self) -> bool: ...

    @property
    def among(self) -> str:
        """Ranks of the exchange, as `encode_ranks` writes them; "" is all."""
        ...

    @property
    def call(self) -> Node:
        """Equal on ranks that are in one and the same call of an exchange."""
        ...


class Exchanges:
    """The exchanges that ranks wait in, and who is missing from each."""

    def __init__(self, heartbeats: Mapping[int, Waits]) -> None:
        self.heartbeats = heartbeats
        self.node = {rank: heartbeat.call if heartbeat.waits else (rank,) for rank, heartbeat in heartbeats.items()}
        self.here: dict[Node, set[int]] = {}
        for rank, node in self.node.items():
            self.here.setdefault(node, set()).add(rank)

    def missing(self, node: Node) -> set[int]:
        """Ranks that those in the exchange wait for."""
        heartbeat = self.heartbeats[next(iter(self.here[node]))]
        if not heartbeat.waits:
            return set()
        ranks = decode_ranks(heartbeat.among) & self.heartbeats.keys() if heartbeat.among else set(self.heartbeats)
        return ranks - self.here[node]

    def after(self, node: Node) -> dict[Node, int]:
        """The nodes next on the chain, each with a rank that leads there.

        An exchange that lacks nobody is about to end, and holds nobody up.
        """
        found = {self.node[rank]: rank for rank in sorted(self.missing(node), reverse=True)}
        return {other: rank for other, rank in found.items() if not self.heartbeats[rank].waits or self.missing(other)}

    def reach(self, start: Node, after: Callable[[Node], Iterable[Node]]) -> dict[Node, Node]:
        """Every node on a way from ``start``, with the one before it."""
        before, queue = {start: start}, [start]
        for node in queue:
            for other in after(node):
                if other not in before:
                    before[other] = node
                    queue.append(other)
        return before

    def cycle(self, start: Node) -> set[Node]:
        """Nodes that are reached from ``start`` and lead nowhere but to each other."""
        while True:
            reached = self.reach(start, self.after)
            back: dict[Node, list[Node]] = {}
            for node in reached:
                for other in self.after(node):
                    back.setdefault(other, []).append(node)
            returning = self.reach(start, lambda node, back=back: back.get(node, ()))  # type: ignore[misc]
            further = next((node for node in reached if node not in returning), None)
            if further is None:
                return set(reached)
            start = further


def wait_ends(start: int, heartbeats: Mapping[int, Waits]) -> list[tuple[int, ...]]:
    """Whom ``start``, which waits, waits for in the end: each rank that works on a way from it.

    Where all on the way wait: the ranks of the one circle that they lead to.
    """
    store = Exchanges(heartbeats)
    reached = store.reach(store.node[start], store.after)
    working = sorted(rank for node in reached for rank in store.here[node] if not heartbeats[rank].waits)
    if working:
        return [(rank,) for rank in working]
    return [tuple(sorted(rank for node in store.cycle(store.node[start]) for rank in store.here[node]))]


def wait_path(start: int, end: int, heartbeats: Mapping[int, Waits]) -> tuple[int, ...]:
    """Ranks on the shortest way between the two, of which ``start`` waits."""
    store = Exchanges(heartbeats)
    before, node = store.reach(store.node[start], store.after), store.node[end]
    ranks = []
    while before[node] != node:
        ranks.append(store.after(before[node])[node])
        node = before[node]
    return tuple(reversed(ranks[1:]))


def encode_ranks(ranks: Iterable[int]) -> str:
    """Ranks as runs, `0-6:2,9`: a mesh's group of thousands is a few of them."""
    ranks, runs = sorted(ranks), []
    while ranks:
        step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
        count = 1
        while count < len(ranks) and ranks[count] - ranks[count - 1] == step:
            count += 1
        runs.append(f"{ranks[0]}-{ranks[count - 1]}:{step}" if count > 1 else f"{ranks[0]}")
        ranks = ranks[count:]
    return ",".join(runs)


def decode_ranks(text: str) -> set[int]:
    """The ranks that `encode_ranks` wrote."""
    ranks: set[int] = set()
    for run in text.split(","):
        first, _, rest = run.partition("-")
        last, _, step = rest.partition(":")
        ranks.update(range(int(first), int(last or first) + 1, int(step or 1)))
    return ranks
