"""Who waits for whom: from one waiting rank along the exchanges to whoever stands at the end of the chain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

Node = tuple[object, ...]  # an exchange that ranks wait in, or a rank that waits in none


class Waits(Protocol):
    """What the walk has to know of a rank."""

    @property
    def waits(self) -> bool: ...

    @property
    def among(self) -> str:
        """Ranks of the exchange, as `spell` writes them; "" is all."""
        ...

    @property
    def call(self) -> Node:
        """Equal on ranks that are in one and the same call of an exchange."""
        ...


@dataclass(frozen=True)
class End:
    """Where the chain ends. Ranks that wait for each other in a circle are one end."""

    ranks: tuple[int, ...]
    by_way_of: tuple[int, ...]  # ranks between the first and the end


class Board:
    """The exchanges that ranks wait in, and who is missing from each."""

    def __init__(self, signs: Mapping[int, Waits]) -> None:
        self.signs = signs
        self.node = {rank: sign.call if sign.waits else (rank,) for rank, sign in signs.items()}
        self.here: dict[Node, set[int]] = {}
        for rank, node in self.node.items():
            self.here.setdefault(node, set()).add(rank)

    def missing(self, node: Node) -> set[int]:
        """Ranks that those in the exchange wait for."""
        sign = self.signs[next(iter(self.here[node]))]
        if not sign.waits:
            return set()
        ranks = spelt(sign.among) & self.signs.keys() if sign.among else set(self.signs)
        return ranks - self.here[node]

    def after(self, node: Node) -> dict[Node, int]:
        """The nodes next on the chain, each with a rank that leads there."""
        return {self.node[rank]: rank for rank in sorted(self.missing(node), reverse=True)}

    def reach(self, start: Node, after: Callable[[Node], Iterable[Node]]) -> dict[Node, Node]:
        """Every node on a way from ``start``, with the one before it."""
        before, queue = {start: start}, [start]
        for node in queue:
            for other in after(node):
                if other not in before:
                    before[other] = node
                    queue.append(other)
        return before

    def circle(self, start: Node) -> set[Node]:
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


def ends(start: int, signs: Mapping[int, Waits]) -> list[End]:
    """Whom ``start``, which waits, waits for in the end: each rank that works on a way from it.

    Where all on the way wait, the one circle that they lead to, or the exchange that lacks nobody.
    """
    board = Board(signs)
    first = board.node[start]
    before = board.reach(first, board.after)
    working = sorted(rank for node in before for rank in board.here[node] if not signs[rank].waits)
    if working:
        return [End((rank,), _way(board, before, board.node[rank])) for rank in working]
    circle = board.circle(first)
    ranks = sorted(rank for node in circle for rank in board.here[node])
    nearest = next(node for node in before if node in circle)  # in the order of their distance
    return [End(tuple(ranks), _way(board, before, nearest))]


def _way(board: Board, before: Mapping[Node, Node], node: Node) -> tuple[int, ...]:
    """Ranks that lead to ``node``, without the first and the last."""
    way = []
    while before[node] != node:
        way.append(board.after(before[node])[node])
        node = before[node]
    return tuple(reversed(way[1:]))


def spell(ranks: Iterable[int]) -> str:
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


def spelt(text: str) -> set[int]:
    """The ranks that `spell` wrote."""
    ranks: set[int] = set()
    for run in text.split(","):
        first, _, rest = run.partition("-")
        last, _, step = rest.partition(":")
        ranks.update(range(int(first), int(last or first) + 1, int(step or 1)))
    return ranks
