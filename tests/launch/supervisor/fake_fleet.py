"""A fleet whose nodes run nothing: a script says how each start ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.fleet import Assignment, NodeReport, NodeState
from train.run_dir.exit_file import claim_exit, forget_exit


@dataclass
class Ending:
    """How a start ends."""

    steps: int = 0  # that it adds to the newest checkpoint's
    codes: dict[int, int] = field(default_factory=dict)  # of ranks that fail; the others end with 1
    exit: tuple[int, dict[str, Any]] | None = None  # code and further fields of exit.json
    lost: tuple[str, ...] = ()  # nodes that fall silent
    back: tuple[str, ...] = ()  # lost nodes that answer again
    store_error: str = ""
    saved: bool = False  # whether the newest step has a checkpoint


class FakeFleet:
    """Nodes a, b, …; ``script`` is asked for the ending of each start.

    Args:
        folder: the run's; gets the metrics.jsonl, exit.json and empty checkpoint folders that ranks would write.
    """

    def __init__(self, names: Sequence[str], folder: Path, script: Callable[[Assignment], Ending]) -> None:
        self.names, self.folder, self.script = list(names), folder, script
        self.silent: set[str] = set()
        self.started: list[Assignment] = []
        self.stopped: list[int] = []
        self.reported: list[NodeReport] = []
        self.waiting: list[NodeReport] = []  # of nodes whose ranks hang until they are stopped
        self.step = 0
        self.error, self.is_stopped = "", False
        folder.mkdir(parents=True, exist_ok=True)

    def nodes(self) -> list[NodeState]:
        if self.error:
            raise ConnectionError(self.error)
        return [NodeState(name, i, 0.0) for i, name in enumerate(self.names) if name not in self.silent]

    def start(self, assignment: Assignment) -> None:
        self.error = ""
        self.started.append(assignment)
        assert not self.silent.intersection(assignment.nodes), "ranks on a node that is lost"
        ending = self.script(assignment)
        forget_exit(self.folder)
        resumed = [word for word in assignment.overrides if word.startswith("checkpoint.resume='/")]
        self.train(int(resumed[-1].rpartition("-")[2].strip("'")) if resumed else None, ending.steps)
        if ending.saved:
            (self.folder / "checkpoints" / f"step-{self.step:08d}").mkdir(parents=True, exist_ok=True)
        if ending.exit is not None:
            claim_exit(self.folder, ending.exit[0], "because", ending.exit[1])
        self.silent = (self.silent | set(ending.lost)) - set(ending.back)
        self.error = ending.store_error
        failed, self.reported, self.waiting = bool(ending.codes or ending.lost), [], []
        for number, name in enumerate(assignment.nodes):
            ranks = range(number * assignment.processes, (number + 1) * assignment.processes)
            codes = {rank: ending.codes.get(rank, int(failed)) for rank in ranks}
            first = next((rank for rank in ranks if rank in ending.codes), None)
            report = NodeReport(name, assignment.incarnation, codes, first, "", float(first is None))
            if name not in self.silent:
                (self.waiting if failed and first is None else self.reported).append(report)

    def train(self, base: int | None, steps: int) -> None:
        if base is not None:
            self.step = base
        self.step += steps
        path = self.folder / "metrics.jsonl"
        whole = path.with_suffix(".new")  # as a resume does: a reader must see the old file or the new one
        whole.write_text("".join(json.dumps({"step": step + 1}) + "\n" for step in range(self.step)))
        whole.replace(path)

    def reports(self, incarnation: int) -> list[NodeReport]:
        if self.error:
            raise ConnectionError(self.error)
        return [report for report in self.reported if report.incarnation == incarnation]

    def signal(self, number: int) -> None:
        raise AssertionError("the supervisor sends no signals")

    def stop_ranks(self, incarnation: int, grace_seconds: float) -> None:
        self.stopped.append(incarnation)
        self.reported, self.waiting = self.reported + self.waiting, []

    def stop_requested(self) -> bool:
        return self.is_stopped
