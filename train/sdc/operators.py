"""The operators' part of a step's checks: a repeated call, its bundle, and a redone tile of the update."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

import torch

from parallel.sdc.bundle import write_bundle
from parallel.sdc.finding import Finding, layer_of
from parallel.sdc.recompute import Persistence, Recomputer
from parallel.sdc.update import UpdateCheck
from parallel.state_store import ShardedAdamW
from train.state import TrainState


@dataclass(frozen=True)
class OperatorReport:
    """What a rank found in the operators of a step, for all ranks."""

    operator: str
    module: str
    persistence: str
    elements: int
    largest: float
    bundle: str  # the file that was written, or why there is none
    since: int  # the first step since this call's last turn; that of the finding if the fault is transient


class OperatorChecks:
    """Repeats one operator call and one tile of the update in each step in which a check is due."""

    def __init__(self, state: TrainState, every: int, rank: int, folder: Path) -> None:
        self.rank, self.folder, self.step = rank, folder, 0
        self.recomputer = Recomputer(every)
        self.recomputer.install(list(state.models))
        store = state.store
        self.update = UpdateCheck(store.parameters, store.optimizer, every) if isinstance(store, ShardedAdamW) else None
        if self.update and every:
            self.update.install()

    def begin_step(self, step: int) -> None:
        self.step = step
        self.recomputer.begin_step(step)
        if self.update:
            self.update.begin_step(step)

    def end_step(self) -> None:
        """After the update."""
        if self.update:
            self.update.end_step()

    def count(self) -> int:
        """Calls of this step that differ; ends the observation of the step."""
        self.recomputer.end_step()
        return len(self.recomputer.differences)

    def report(self) -> OperatorReport | None:
        """The first call that differs, saved as a bundle."""
        found = self.recomputer.take()
        if not found:
            return None
        first = found[0]
        path = self.folder / f"step-{self.step:08d}-rank-{self.rank}.pt"
        about = {"step": self.step, "rank": self.rank, "host": socket.gethostname(), "torch": str(torch.__version__)}
        try:
            write_bundle(path, first, {**about, "persistence": str(first.persistence)})
            bundle = f"longcat replay {path} repeats the call"
        except Exception as error:  # torch raises RuntimeError on a full disk; the other ranks wait for this report
            bundle = f"the call could not be saved to {path} ({type(error).__name__}: {error})".replace("\n", " ")
        is_transient = first.persistence == Persistence.transient
        since = self.step if is_transient else max(1, self.step - self.recomputer.period + 1)
        return OperatorReport(
            first.operator, first.module, str(first.persistence), first.elements, first.largest, bundle, since
        )


def operator_finding(step: int, reports: list[OperatorReport | None]) -> Finding:
    """The finding of all ranks' reports, by rank; one is not None."""
    ranks = tuple(rank for rank, report in enumerate(reports) if report is not None)
    first = reports[ranks[0]]
    assert first is not None
    where = f" in {first.module}" if first.module else ""
    alike = {(one.operator, one.module, one.persistence) for one in reports if one is not None}
    is_everywhere = len(ranks) == len(reports) > 1 and len(alike) == 1 and first.persistence == Persistence.lasting
    doubt = "; every rank finds it, so rather suspect the program than a device" if is_everywhere else ""
    return Finding(
        "operator",
        step,
        f"{first.operator}{where}",
        ranks,
        layer_of(first.module),
        operator=first.operator,
        detail=f"gives other bits when it is repeated from permuted operands ({first.elements} elements, by up to "
        f"{first.largest:.3g}); the fault is {first.persistence}{doubt}; {first.bundle}",
        since=min(one.since for one in reports if one is not None),
    )


def update_finding(step: int, names: list[str | None]) -> Finding:
    """The finding of a tile of the update that differs when it is redone, from all ranks' names of parameters."""
    ranks = tuple(rank for rank, name in enumerate(names) if name is not None)
    name = str(names[ranks[0]])
    return Finding(
        "update",
        step,
        name,
        ranks,
        layer_of(name),
        operator="AdamW",
        tensor=name,
        detail=f"has other bits than AdamW gives when step {step - 1}'s update is redone",
    )
