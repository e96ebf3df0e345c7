"""Replay: ranks compute the step of their neighbour's expert group and compare what both computed, bit by bit.

The ranks of two neighbouring expert groups that have the same coordinates in them hold the same weights. So in a step
in which a replay is due each rank first runs forward and backward of its neighbour's micro-batches, then of its own,
and traces both: a checksum of what each module returns, of each message inside the group, and of each complete gradient
before ranks are summed. Another device shows what no repetition in place can: faults of a whole device, and of
operators that cannot be permuted.

A difference alone names two ranks. A second round, in which every rank computes its own step again and that of the
group after next (of two groups, of the next one again), names one wherever the others are in the majority or a rank
contradicts itself.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from parallel.checksum import Digests, combined, digest, fetched
from parallel.mesh import MeshSizes
from parallel.reduce import all_gather_object
from parallel.sdc.finding import Finding, layer_of
from parallel.sdc.ledger import LEDGER, RECEIVED
from parallel.torch_internals import on_gradients, parameter_groups_of
from parallel.watchdog.events import Event, SpanKind

CHANNEL = "replay"  # of the ledger's entries
# Messages between groups, of which each rank gets other parts
SUMS = tuple(Event(kind).text for kind in (SpanKind.GRADIENT_REDUCE_SCATTER, SpanKind.EMBEDDING_GRADIENTS))
STRETCH = 512  # entries of a trace that travel at once
Traced = list[tuple[str, int]]  # what was computed, sent and received, in order, and its checksum


class Trace:
    """What this rank's models compute while it records."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, Digests]] | None = None
        self._watched: weakref.WeakSet[Any] = weakref.WeakSet()  # modules and groups of parameters

    def watch(self, models: Sequence[nn.Module]) -> None:
        """Let the modules and gradients of ``models`` be recorded when `recorded` asks for it."""
        for model in models:
            for name, module in model.named_modules():
                if module not in self._watched:
                    self._watched.add(module)
                    module.register_forward_hook(self._noting(name or "losses"))
                for group in parameter_groups_of(module) if isinstance(module, FSDPModule) else ():
                    if group not in self._watched:
                        self._watched.add(group)
                        on_gradients(group, lambda: self._entries is not None, self._note_gradient)

    @contextmanager
    def recorded(self) -> Iterator[list[tuple[str, Digests]]]:
        """Record what is computed meanwhile into the list."""
        entries: list[tuple[str, Digests]] = []
        self._entries = entries
        LEDGER.on_transfer = self._note_transfer
        try:
            yield entries
        finally:
            self._entries = LEDGER.on_transfer = None

    def _noting(self, name: str) -> Any:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            if self._entries is not None:
                parts = output if isinstance(output, tuple) else (output,)
                self._entries.extend((name, digest(part)) for part in parts if isinstance(part, Tensor))

        return note

    def _note_transfer(self, name: str, checksums: Digests) -> None:
        if self._entries is not None and not name.partition(" ")[2].startswith(SUMS):
            self._entries.append((name, checksums))

    def _note_gradient(self, name: str, gradient: Tensor) -> None:
        if self._entries is not None:
            self._entries.append((f"gradient of {name}", digest(gradient)))


TRACE = Trace()


def resolved(entries: list[tuple[str, Digests]]) -> Traced:
    """The entries with their checksums as numbers; those of a collective's parts are one entry each."""
    found = fetched([value for _, value in entries])
    return [(name, value) for (name, _), values in zip(entries, found, strict=True) for value in values.tolist()]


@contextmanager
def traced() -> Iterator[Traced]:
    """Record into the list what is computed meanwhile; it is complete at the end."""
    found: Traced = []
    with TRACE.recorded() as entries:
        yield found
    found += resolved(entries)


def total_of(trace: Traced) -> int:
    """One number for a whole trace."""
    return combined(value for _, value in trace)


@dataclass(frozen=True)
class Neighbours:
    """Whose step a rank replays: that of the data rank one expert group further, in a ring."""

    sizes: MeshSizes

    @property
    def group(self) -> int:
        """Data ranks of an expert group, or of several that only together have whole data ranks."""
        shared = self.sizes.cp * self.sizes.tp
        return math.lcm(self.sizes.ep, shared) // shared

    @property
    def number(self) -> int:
        """Expert groups with the same weights and different data; a replay needs two."""
        return self.sizes.data_ranks // self.group

    def data_rank(self, data_rank: int, groups: int) -> int:
        """The data rank with the same coordinates ``groups`` expert groups further."""
        return (data_rank + groups * self.group) % self.sizes.data_ranks

    def rank(self, rank: int, groups: int) -> int:
        """As `data_rank`, of a global rank."""
        inner = self.sizes.cp * self.sizes.tp
        stage, rest = divmod(rank, self.sizes.data_ranks * inner)
        data_rank, place = divmod(rest, inner)
        return (stage * self.sizes.data_ranks + self.data_rank(data_rank, groups)) * inner + place


def record(neighbours: Neighbours, rank: int, own: Traced, theirs: Traced) -> None:
    """Enter this rank's two traces into the ledger, which compares them with those of its two neighbours."""
    LEDGER.put(CHANNEL, CHANNEL, 1, [neighbours.rank(rank, -1)], total_of(own), is_sender=True)
    LEDGER.put(CHANNEL, CHANNEL, 1, [neighbours.rank(rank, 1)], total_of(theirs), is_sender=False)


@dataclass(frozen=True)
class Computation:
    """One pass over a step's micro-batches."""

    of: int  # the rank whose micro-batches they are
    by: int  # the rank that computed
    total: int  # of the whole trace
    part: Traced  # the stretch of it in which computations of the same micro-batches first differ
    start: int = 0  # the stretch's place in the trace


def gather(passes: Sequence[tuple[int, Traced]]) -> list[Computation]:
    """The computations of all ranks, from this rank's: for each, whose micro-batches they were. A collective.

    A trace may have a hundred thousand entries, so only the stretches that matter travel.
    """
    totals = all_gather_object([(of, total_of(traced)) for of, traced in passes])
    values: dict[int, set[int]] = defaultdict(set)
    for of, total in chain.from_iterable(totals):
        values[of].add(total)
    disputed = {of for of, found in values.items() if len(found) > 1}
    mine = {number: one for number, one in enumerate(passes) if one[0] in disputed}
    hashes = all_gather_object({number: stretches(traced) for number, (_, traced) in mine.items()})
    by_batch: dict[int, list[list[int]]] = defaultdict(list)
    for by, of_rank in enumerate(hashes):
        for number, hashed in of_rank.items():
            by_batch[totals[by][number][0]].append(hashed)
    first = {
        of: next(place for place, same in enumerate(zip_longest(*of_batch)) if len(set(same)) > 1)
        for of, of_batch in by_batch.items()
    }
    parts = all_gather_object(
        {n: traced[first[of] * STRETCH : (first[of] + 1) * STRETCH] for n, (of, traced) in mine.items()}
    )
    return [
        Computation(of, by, total, parts[by].get(number, []), first.get(of, 0) * STRETCH)
        for by, of_rank in enumerate(totals)
        for number, (of, total) in enumerate(of_rank)
    ]


def stretches(trace: Traced) -> list[int]:
    """The total of each stretch of a trace."""
    return [total_of(trace[first : first + STRETCH]) for first in range(0, len(trace), STRETCH)]


@dataclass(frozen=True)
class Suspect:
    """A rank that computed something else than others did."""

    rank: int
    at: int  # the number of the first thing in the trace that differs
    what: str
    certain: bool  # others are in the majority, or it contradicts itself
    lasting: bool = True  # it computed the same wrong bits twice, or nothing right

    def order(self) -> tuple[bool, int]:
        """Smaller is likelier: who received something wrong is a victim, and who differs first is the cause."""
        return self.what.startswith(RECEIVED), self.at


def find_suspects(computations: Sequence[Computation]) -> list[Suspect]:
    """Who computed otherwise than the majority of ranks, the likeliest cause first.

    A wrong value travels: to later modules, and in messages to other ranks. So the first is the rank whose own
    computation differs earliest.
    """
    by_batch: dict[int, list[Computation]] = defaultdict(list)
    for one in computations:
        by_batch[one.of].append(one)
    found: dict[int, list[Suspect]] = defaultdict(list)
    wrong: Counter[int] = Counter()  # computations, by rank
    repeated: dict[int, bool] = defaultdict(bool)  # whether it computed the same wrong bits twice
    for same in by_batch.values():
        voters: dict[int, set[int]] = defaultdict(set)
        parts = {one.total: one for one in same}
        for one in same:
            voters[one.total].add(one.by)
        if len(voters) == 1:
            continue
        (right, most), (other, second), *_ = Counter({total: len(by) for total, by in voters.items()}).most_common()
        unsteady = {rank for rank, count in Counter(r for by in voters.values() for r in by).items() if count > 1}
        for total, ranks in voters.items():
            if most > second and total == right:
                continue
            at, what = first_difference(parts[total], parts[right if total != right else other])
            for rank in ranks & unsteady if most == second and unsteady else ranks:
                times = sum((one.by, one.total) == (rank, total) for one in same)
                wrong[rank] += times
                repeated[rank] |= times > 1
                found[rank].append(Suspect(rank, at, what, most > second or bool(unsteady)))
    sure = {rank for rank, suspects in found.items() if any(one.certain for one in suspects)}
    passes = Counter(one.by for one in computations)
    firsts = [
        replace(min(suspects, key=Suspect.order), lasting=repeated[rank] or wrong[rank] == passes[rank])
        for rank, suspects in found.items()
        if not sure or rank in sure
    ]
    return sorted(firsts, key=lambda one: (one.order(), one.rank))


def first_difference(one: Computation, other: Computation) -> tuple[int, str]:
    """The number and name of the first thing in which two traces differ."""
    for number, (mine, theirs) in enumerate(zip(one.part, other.part, strict=False)):
        if mine != theirs:
            return one.start + number, mine[0]
    if len(one.part) == len(other.part):  # a third trace differed first
        return sys.maxsize, "a later computation"
    return one.start + min(len(one.part), len(other.part)), "the number of calls"


def replay_finding(step: int, computations: Sequence[Computation], every: int = 1) -> Finding:
    """The finding of a replay whose traces differ, from both rounds; the replay before was ``every`` steps ago."""
    found, since = find_suspects(computations), max(1, step - every + 1)
    if not found:
        everyone = tuple(sorted({one.by for one in computations}))
        detail = "differed in a replay, and nothing differed when it was repeated; the fault is transient"
        return Finding("replay", step, "the step's computation", everyone, detail=detail)
    first = found[0]
    # Where the first to differ is a receiver, no rank's own computation shows the cause
    suspects = tuple(one.rank for one in found if one.order() == first.order() or first.order()[0])
    if not first.certain:
        nature = "they disagree in every repetition, so one of them is defective for good"
    elif first.lasting:
        nature = "the fault is lasting"
    else:
        nature, since = "the fault is transient", step
    detail = f"has other bits than when another rank computes the same micro-batches; {nature}"
    return Finding("replay", step, first.what, suspects, layer_of(first.what), first.what, "", detail, since)
