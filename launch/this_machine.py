"""One machine as a fleet of one node: its ranks, and the process of their store, are children of this process."""

from __future__ import annotations

import os
import platform
import sys
import time
from contextlib import ExitStack

from launch.fleet import GRACE_SECONDS, Assignment, NodeReport, NodeState
from launch.leader import decide_end
from launch.nodes.store import RanksStore
from launch.ranks import LocalRanks
from launch.signals import Signals
from train.config import Config

HOST = "127.0.0.1"
POLL_SECONDS = 0.05


def run_here(overrides: list[str], config: Config, processes: int) -> int:
    """Train on ``processes`` ranks of this machine; returns the run's exit code."""
    with Signals() as signals:
        fleet = ThisMachine(signals)
        return decide_end(config, fleet, Assignment(1, (fleet.name,), processes, tuple(overrides)), 1)


class ThisMachine:
    """The one node of a run on one machine. `start` returns when the ranks have ended."""

    def __init__(self, signals: Signals) -> None:
        self.signals = signals
        self.name = platform.node() or "this machine"
        self.reported: dict[int, NodeReport] = {}

    def nodes(self) -> list[NodeState]:
        return [NodeState(self.name, 0, 0.0)]

    def start(self, assignment: Assignment) -> None:
        """Start the ranks and wait for their end; after the first failure the others have a while to say why."""
        with ExitStack() as stack:
            store = stack.enter_context(RanksStore(HOST))
            ranks = LocalRanks(assignment.overrides, 0, assignment.processes, environment(assignment, store.port))
            stack.callback(ranks.kill)
            while not ranks.poll():
                for number in self.signals.take():
                    ranks.signal(number)
                ranks.end_within(ranks.grace_seconds)
                if store.has_ended() and ranks.first_failed is None and ranks.kill_at == float("inf"):
                    print("launch: the process of the ranks' store has ended", file=sys.stderr, flush=True)
                    ranks.end_within(GRACE_SECONDS)
                time.sleep(POLL_SECONDS)
        last, ended = ranks.last_lines(ranks.first_failed), ranks.failed_at or time.time()
        own = assignment.incarnation
        self.reported[own] = NodeReport(self.name, own, ranks.codes, ranks.first_failed, last, ended)

    def reports(self, incarnation: int) -> list[NodeReport]:
        return [self.reported[incarnation]] if incarnation in self.reported else []

    def signal(self, number: int) -> None:
        """`start` passes on this process's signals."""

    def stop_ranks(self, incarnation: int, grace_seconds: float) -> None:
        """They have ended."""

    def stop_requested(self) -> bool:
        return self.signals.is_stopped()


def environment(assignment: Assignment, port: int) -> dict[str, str]:
    """What torch.distributed reads, with a store that is not rank 0's."""
    return {
        "MASTER_ADDR": HOST,
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": str(True),
        "TORCHELASTIC_RESTART_COUNT": str(assignment.incarnation),
        "TORCHELASTIC_RUN_ID": f"longcat-{os.getpid()}",
        "WORLD_SIZE": str(assignment.processes),
        "LOCAL_WORLD_SIZE": str(assignment.processes),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get(
            "TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"
        ),  # as torchrun sets it
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
    }
