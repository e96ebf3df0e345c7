"""The checks of a training step: what is recorded, what the step's collective carries, and the diagnosis.

begin_step     checksums of the state exist; from here on messages and gathered weights are recorded
forward, backward
numbers        the state's checksums again; this rank's row and its share of the cells  → the step's collective
judge          the same sums on every rank: raise on all, or on none; nothing was updated yet
update
end_step       checksums of the new state
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from longcat.faults import is_active
from parallel.checksum import mix
from parallel.device import arithmetic_of
from parallel.mesh import Topology
from parallel.reduce import all_gather_object
from parallel.sdc.finding import Finding, Site, layer_of
from parallel.sdc.gathered import CHANNEL as GATHERED_CHANNEL
from parallel.sdc.gathered import GATHERED
from parallel.sdc.inject import Injector
from parallel.sdc.ledger import LEDGER, Entry, Mismatch, differs, mismatches, suspects
from parallel.sdc.replay import CHANNEL, TRACE, Neighbours, Traced, gather, record, replay_finding, total_of
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import work_span
from train.sdc.at_rest import Checksums, Key, changed, checksums, strike, strike_update, tensors_at_rest, total
from train.sdc.config import SdcConfig
from train.sdc.operators import OperatorChecks, OperatorReport, operator_finding, update_finding
from train.state import TrainState

# of a rank's row: changed tensors at rest, replica's state, replicated state, sender's and receiver's cell, operators
# and update
COLUMNS = 7


class RankReport(NamedTuple):
    """What one rank tells all others when the sum of their checks shows a difference."""

    site: Site
    changed: list[str]  # tensors at rest
    entries: list[Entry]  # of its ledger, of suspected senders
    checksums: Checksums  # of its state
    operator: OperatorReport | None
    updated: str | None  # a parameter of which a tile of the last update differs


class Guard:
    """Watches one rank's training steps."""

    def __init__(self, state: TrainState, config: SdcConfig, topology: Topology, folder: Path, repeats: bool) -> None:
        """``folder`` is where calls that differ are saved; ``repeats``: whether a call repeats bit by bit."""
        self.state, self.config, self.topology = state, config, topology
        self.operators = OperatorChecks(state, config.every if repeats else 0, topology.rank, folder)
        self.injector = Injector(config.faults, topology.rank)
        self.injector.install()
        self.checks_state = config.every > 0 and config.at_rest and not state.store.transient
        self.neighbours = Neighbours(topology.sizes)
        can_replay = config.every > 0 and repeats and state.store.has_replicas and self.neighbours.number > 1
        self.replay_every = config.replay_every if can_replay else 0
        self.note = ""  # for people
        LEDGER.rank, LEDGER.sites = topology.rank, []
        if config.every:
            site = Site.here(topology.rank, topology.device)
            sites, kinds = zip(*all_gather_object((site, arithmetic_of(topology.device))), strict=True)
            LEDGER.sites = list(sites)
            pairs = {(kind, kinds[self.neighbours.rank(rank, 1)]) for rank, kind in enumerate(kinds)}
            different = sorted({"; ".join(sorted(pair)) for pair in pairs if pair[0] != pair[1]})
            if self.replay_every and different:
                self.replay_every = 0
                self.note = f"sdc.replay_every is off: ranks to compare have different devices: {different[0]}"
        self.replay: Callable[[int], Traced] | None = None  # computes the step of a group so many groups further
        self.traces: tuple[Traced, Traced] = [], []  # of this step: this rank's, and the replay of its neighbour's
        self.step = 0
        self.changed: list[str] = []
        self.updated: str | None = None  # a parameter of which a tile of the last update differs
        if config.every or self.injector.faults:
            for model in state.models:
                GATHERED.watch(model)
        if self.replay_every:
            TRACE.watch(state.models)

    @property
    def replays(self) -> bool:
        """Whether this step is computed by a neighbour too."""
        return self.replay_every > 0 and self.step % self.replay_every == 0

    def begin_step(self, step: int) -> None:
        """Before a step's forward."""
        self.step = step
        self.injector.begin_step(step)
        is_due = self.config.every > 0 and step % self.config.every == 0
        LEDGER.begin(self.topology.rank, step, is_due or self.replays)
        GATHERED.begin_step()
        self.operators.begin_step(step)
        if self.checks_state and self.state.checksums is None:
            self._take()
        if is_active():
            strike(self.state)

    def compare_with_neighbours(self, own: Traced, theirs: Traced) -> None:
        """What this rank computed of its own step and of its neighbour's, which `judge` compares with theirs."""
        self.traces = own, theirs
        record(self.neighbours, self.topology.rank, own, theirs)

    def numbers(self) -> Tensor:
        """This rank's part of the sums over ranks, [ranks, COLUMNS] float64; empty without checks."""
        if not self.config.every:
            return torch.zeros(0, COLUMNS, dtype=torch.float64)
        rows = torch.zeros(self.topology.world_size, COLUMNS, dtype=torch.float64)
        rows[:, 3:5] = LEDGER.cells(self.topology.world_size)
        rows[self.topology.rank, 5] = self.operators.count()
        rows[self.topology.rank, 6] = float(self.updated is not None)
        if self.checks_state:
            assert self.state.checksums is not None
            with work_span(Event(SpanKind.CHECKSUMS)):
                self.changed = changed(self.state.checksums, checksums(tensors_at_rest(self.state)))
            own = (len(self.changed), total(self.state.checksums), self._replicated(self.state.checksums))
            rows[self.topology.rank, :3] = torch.tensor(own, dtype=torch.float64)
        return rows

    def judge(self, rows: Tensor) -> None:
        """Raise on every rank if the sums of all ranks' `numbers` show that something differs.

        Raises:
            CorruptionError: with the diagnosis, the same on every rank. A collective only then.
        """
        if not rows.numel():
            return
        at_rest, in_transfer = bool(rows[:, 0].any()), differs(rows[:, 3:5])
        replicas = self._split(rows[:, 1]) or bool((rows[:, 2] != rows[0, 2]).any())
        in_operators, in_update = bool(rows[:, 5].any()), bool(rows[:, 6].any())
        if not (at_rest or in_transfer or replicas or in_operators or in_update):
            return
        report = RankReport(
            Site.here(self.topology.rank, self.topology.device),
            self.changed,
            LEDGER.entries(rows[:, 3:5]) if in_transfer else [],
            (self.state.checksums if self.checks_state else None) or {},
            self.operators.report(),
            self.updated,
        )
        found = all_gather_object(report)
        raise self._finding(found, replicas).error([one.site for one in found])

    def _finding(self, found: list[RankReport], replicas: bool) -> Finding:
        """The finding of all ranks' reports, the one nearest to a cause first."""
        differing = mismatches(one.entries for one in found)
        messages = [one for one in differing if one.channel != CHANNEL]
        if any(one.updated for one in found):
            return update_finding(self.step, [one.updated for one in found])
        if any(one.operator for one in found):
            return operator_finding(self.step, [one.operator for one in found])
        if any(one.changed for one in found):
            return self._state_finding([one.changed for one in found])
        if messages:
            return self._transfer_finding(messages)
        if differing:
            return self._replay_finding()
        if replicas:
            return self._replica_finding([one.checksums for one in found])
        everyone = tuple(range(self.topology.world_size))
        detail = "says that something differs, and no rank's part of it does"
        return Finding("message", self.step, "the sum over ranks of the checks", everyone, detail=detail)

    def judge_repetition(self, first: Tensor, second: Tensor, own_sums: bool) -> None:
        """Raise on every rank if this or another rank's sums differ from those of the repeated step. A collective.

        Without ``own_sums`` they are the sums of all ranks, which name none.

        Raises:
            CorruptionError: naming the ranks whose own sums differ.
        """
        same = torch.equal(first.view(torch.int64), second.view(torch.int64))
        found = all_gather_object((Site.here(self.topology.rank, self.topology.device), same))
        ranks = tuple(rank for rank, (_, is_same) in enumerate(found) if not is_same)
        if ranks:
            detail = "gave other bits when the step was repeated because its loss or gradient norm was a spike"
            if not own_sums or len(ranks) > 1:
                ranks, detail = tuple(range(len(found))), f"{detail}; it shows in sums over ranks, which name none"
            finding = Finding("step", self.step, "forward and backward", ranks, detail=detail)
            raise finding.error([site for site, _ in found])

    def judge_replay(self, own: Traced, theirs: Traced) -> None:
        """Raise on every rank if some rank's trace and that of the neighbour that replayed it differ. A collective.

        Raises:
            CorruptionError: with the diagnosis of a second round.
        """
        rank = self.topology.rank
        self.traces = own, theirs
        found = all_gather_object((Site.here(rank, self.topology.device), total_of(own), total_of(theirs)))
        if any(one[2] != found[self.neighbours.rank(by, 1)][1] for by, one in enumerate(found)):
            raise self._replay_finding().error([one[0] for one in found])

    def end_step(self) -> None:
        """After the update: what is now in memory must stay until the next one."""
        if is_active():
            strike_update(self.state)
        self.traces = [], []
        self.operators.end_step()
        if self.operators.update is not None and self.operators.update.found is not None:
            self.updated = self.operators.update.found.name
        if self.checks_state:
            self._take()
            self._mark_wrong_update()

    def _mark_wrong_update(self) -> None:
        """Let no checkpoint be committed with a weight that AdamW wrote wrongly; the next step ends the run."""
        assert self.state.checksums is not None
        for key in self.state.checksums if self.updated is not None else ():
            if key[0].startswith("weight/") and key[0].endswith(str(self.updated)):
                self.state.checksums[key] ^= 1

    def _take(self) -> None:
        with work_span(Event(SpanKind.CHECKSUMS)):
            self.state.checksums = checksums(tensors_at_rest(self.state))

    def _replicated(self, found: Checksums) -> int:
        """One number for what is equal on all ranks: biases, controller, counters, whole copies of weights."""
        names = {name for name, _ in (*self.state.replicated(), *self.state.store.replicas())}
        combined = total({key: value for key, value in found.items() if key[0] in names})
        for value in vars(self.state.counters).values():
            combined = mix(combined ^ value)
        return combined >> 12

    def _by_replica(self, by_rank: Tensor) -> Tensor:
        """[ranks] → [groups of ranks whose weights and moments are equal: those that differ in dp alone, dp]."""
        sizes = self.topology.sizes
        return by_rank.view(-1, sizes.dp, sizes.fsdp * sizes.cp * sizes.tp).transpose(1, 2).flatten(0, 1)

    def _split(self, totals: Tensor) -> bool:
        """Whether replicas differ. Under DeepSpeed no two ranks have the same part."""
        values = self._by_replica(totals)
        return self.state.store.has_replicas and bool((values != values[:, :1]).any())

    def _state_finding(self, changed_by_rank: list[list[str]]) -> Finding:
        ranks = tuple(rank for rank, names in enumerate(changed_by_rank) if names)
        first = changed_by_rank[ranks[0]]
        more = f" and {len(first) - 1} more tensors" if len(first) > 1 else ""
        return Finding(
            "state at rest",
            self.step,
            f"{first[0]}{more}",
            ranks,
            layer_of(first[0]),
            tensor=first[0],
            detail="changed in memory since the last update",
        )

    def _transfer_finding(self, found: list[Mismatch]) -> Finding:
        first = found[0]
        gathered = first.channel.startswith(GATHERED_CHANNEL)
        return Finding(
            "gathered weight" if gathered else "message",
            self.step,
            first.label,
            suspects(first),
            layer_of(first.label),
            operator="" if gathered else first.label,
            tensor=first.label if gathered else "",
            detail=f"differs between rank {first.sender}, which has it, and "
            f"rank{'s' * (len(first.receivers) > 1)} {', '.join(map(str, first.receivers))}, which received it",
        )

    def _replay_finding(self) -> Finding:
        """Compute this step again, and the next group's or, if there is a third, the one's after it. A collective."""
        assert self.replay is not None
        rank, neighbours = self.topology.rank, self.neighbours
        further = 2 if neighbours.number > 2 else 1
        traces = [(0, self.traces[0]), (1, self.traces[1]), (0, self.replay(0)), (further, self.replay(further))]
        passes = [(neighbours.rank(rank, groups), traced) for groups, traced in traces]
        return replay_finding(self.step, gather(passes), self.replay_every)

    def _replica_finding(self, states: list[Checksums]) -> Finding:
        everywhere = list(range(len(states)))
        shared: set[Key] = {(name, ()) for name, _ in (*self.state.replicated(), *self.state.store.replicas())}
        has_replicas = self.state.store.has_replicas
        replicas = self._by_replica(torch.arange(len(states))).tolist() if has_replicas else []
        compared: list[tuple[list[int], set[Key]]] = [(ranks, set(states[ranks[0]])) for ranks in replicas]
        for ranks, keys in (*compared, (everywhere, shared)):
            for key in sorted(keys):
                values = [states[rank].get(key) for rank in ranks]
                if len(set(values)) > 1:
                    return self._minority_finding(key[0], ranks, values)
        return Finding("replicas", self.step, "the counters", tuple(everywhere), detail="differ between ranks")

    def _minority_finding(self, name: str, ranks: list[int], values: list[int | None]) -> Finding:
        (common, count), *_ = Counter(values).most_common()
        wrong = tuple(rank for rank, value in zip(ranks, values, strict=True) if value != common)
        suspected = wrong if count > len(wrong) else tuple(ranks)
        others = ", ".join(map(str, ranks))
        return Finding(
            "replicas",
            self.step,
            name,
            suspected,
            layer_of(name),
            tensor=name,
            detail=f"differs between the replicas on ranks {others}",
        )
