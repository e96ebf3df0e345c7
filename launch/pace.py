"""How often nodes ask the run's store: more seldom the more they are, since one thread answers all of them."""

from __future__ import annotations

REQUESTS_PER_SECOND = 400  # of all nodes together, that the store has to bear
ENTRIES_PER_SECOND = 2000  # about nodes, in the answers to the first one
HEARTBEATS = 6  # of a node within launch.node_timeout, at least


def node_pause(least: float, nodes: int, node_timeout: float) -> float:
    """Seconds between two requests of one node: ``least`` in a small job."""
    return max(least, min(nodes / REQUESTS_PER_SECOND, node_timeout / HEARTBEATS))


def leader_pause(least: float, nodes: int) -> float:
    """Seconds between two looks of the first node at all nodes: ``least`` in a small job."""
    return max(least, nodes / ENTRIES_PER_SECOND)
