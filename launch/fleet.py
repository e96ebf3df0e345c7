"""The nodes of a run as its leader sees them: members, assignments and reports, and how long ranks may go on."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Protocol

from longcat.errors import BAD_INPUT, CORRUPT, OK, STOPPED, UNHEALTHY
from longcat.json_text import dumps

GRACE_SECONDS = 8.0  # for ranks to say why they end, once one has failed anywhere
SAVE_SECONDS = 3600.0  # for ranks that end because all have agreed to: they may still save
AGREED = (OK, STOPPED, UNHEALTHY, CORRUPT)


@dataclass(frozen=True)
class Assignment:
    """Which ranks one incarnation has, that is one start of all ranks."""

    incarnation: int
    nodes: tuple[str, ...]  # names, in the order of node ranks
    processes: int  # local ranks of each node
    overrides: tuple[str, ...]

    def to_json(self) -> str:
        return dumps(asdict(self))

    @staticmethod
    def parse(text: str) -> Assignment:
        values = json.loads(text)
        return Assignment(**values | {name: tuple(values[name]) for name in ("nodes", "overrides")})


@dataclass(frozen=True)
class NodeReport:
    """How a node's ranks ended in one incarnation."""

    node: str
    incarnation: int
    codes: dict[int, int]  # global rank → exit code; negative: a signal
    first_failed: int | None  # global rank whose failure this node saw first
    stderr: str  # last lines of that rank
    ended: float  # when its first rank failed, or all had ended; seconds since 1970

    def to_json(self) -> str:
        return dumps(asdict(self))

    @staticmethod
    def parse(text: str) -> NodeReport:
        values = json.loads(text)
        return NodeReport(**values | {"codes": {int(rank): code for rank, code in values["codes"].items()}})


@dataclass(frozen=True)
class NodeState:
    """A member of the job."""

    name: str
    id: int  # Slurm's, or the order of arrival
    seconds_silent: float  # since its node runner's last heartbeat
    spare: bool = False  # has no ranks in this incarnation


class Fleet(Protocol):
    """What starts and ends ranks on all nodes. Every method may raise ConnectionError: the nodes cannot be reached."""

    def nodes(self) -> list[NodeState]:
        """Members by id; those that are silent for longer than `launch.node_timeout` are left out."""

    def start(self, assignment: Assignment) -> None:
        """Start the ranks of an incarnation; its number must be higher than all before."""

    def reports(self, incarnation: int) -> list[NodeReport]:
        """Of the nodes whose ranks have ended so far."""

    def signal(self, number: int) -> None:
        """Send a signal to every rank of the current incarnation, once it has a handler."""

    def stop_ranks(self, incarnation: int, grace_seconds: float) -> None:
        """Kill the incarnation's ranks that still run ``grace_seconds`` from now."""

    def stop_requested(self) -> bool:
        """Whether a stop signal has reached any node; the ranks that run have got it."""


def grace_seconds(code: int) -> float:
    """How long other ranks may go on after one has ended with this code."""
    return SAVE_SECONDS if code in AGREED else 1.0 if code == BAD_INPUT else GRACE_SECONDS
