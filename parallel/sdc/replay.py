"""Replay: ranks compute the step of their neighbour's expert group and compare what both computed, bit by bit.

The ranks of two neighbouring expert groups that have the same coordinates in them hold the same weights. So in a step
in which a replay is due each rank first runs forward and backward of its neighbour's micro-batches, then of its own,
and traces both: a checksum of what each module returns, and of each complete gradient before ranks are summed. Another
device shows what no repetition in place can: faults of a whole device, and of operators that cannot be permuted.

A difference alone names two ranks. A second round, in which every rank computes its own step again and that of the
group after next (of two groups, of the next one again), names one wherever the others are in the majority or a rank
contradicts itself.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from parallel.checksum import Digest, digest, mix, resolve
from parallel.mesh import MeshSizes
from parallel.sdc.finding import Finding, layer_of
from parallel.sdc.ledger import LEDGER, Entry
from parallel.torch_internals import on_gradients, parameter_groups_of
from parallel.watchdog.events import Event, SpanKind

CHANNEL = "replay"  # of the ledger's entries
# Messages between groups, of which each rank gets other parts
SUMS = tuple(Event(kind).text for kind in (SpanKind.GRADIENT_REDUCE_SCATTER, SpanKind.EMBEDDING_GRADIENTS))
MESSAGE = "message "  # begins the name of what arrived from another rank
Traced = list[tuple[str, int]]  # what was computed, in order: module or gradient, and its checksum


class Trace:
    """What this rank's models compute while it records."""

    def __init__(self) -> None:
        self._entries: list[tuple[str, Digest]] | None = None
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
                        on_gradients(group, self._note_gradient)

    @contextmanager
    def recorded(self) -> Iterator[list[tuple[str, Digest]]]:
        """Record what is computed meanwhile into the list."""
        entries: list[tuple[str, Digest]] = []
        self._entries = entries
        LEDGER.on_arrival = self._note_message
        try:
            yield entries
        finally:
            self._entries = LEDGER.on_arrival = None

    def _noting(self, name: str) -> Any:
        def note(_: nn.Module, __: Any, output: Any) -> None:
            if self._entries is not None:
                parts = output if isinstance(output, tuple) else (output,)
                self._entries.extend((name, digest(part)) for part in parts if isinstance(part, Tensor))

        return note

    def _note_message(self, label: str, tensor: Tensor) -> None:
        if self._entries is not None and not label.startswith(SUMS):
            self._entries.append((MESSAGE + label, digest(tensor)))

    def _note_gradient(self, name: str, gradient: Tensor) -> None:
        if self._entries is not None:
            self._entries.append((f"gradient of {name}", digest(gradient)))


TRACE = Trace()


def resolved(entries: list[tuple[str, Digest]]) -> Traced:
    """The entries with their checksums as numbers."""
    return list(zip((name for name, _ in entries), resolve(value for _, value in entries), strict=True))


@contextmanager
def traced() -> Iterator[Traced]:
    """Record into the list what is computed meanwhile; it is complete at the end."""
    found: Traced = []
    with TRACE.recorded() as entries:
        yield found
    found += resolved(entries)


def total_of(trace: Traced) -> int:
    """One number for a whole trace."""
    combined = 0
    for _, value in trace:
        combined = mix(combined ^ value)
    return combined


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
    LEDGER.put(Entry(CHANNEL, CHANNEL, 1, rank, (neighbours.rank(rank, -1),), True, total_of(own)))
    LEDGER.put(Entry(CHANNEL, CHANNEL, 1, neighbours.rank(rank, 1), (rank,), False, total_of(theirs)))


@dataclass(frozen=True)
class Computation:
    """One pass over a step's micro-batches."""

    of: int  # the rank whose micro-batches they are
    by: int  # the rank that computed
    traced: Traced


@dataclass(frozen=True)
class Blame:
    """A rank that computed something else than others did."""

    rank: int
    at: int  # the number of the first thing in the trace that differs
    what: str
    lasting: bool  # it computed the same each time
    certain: bool  # others are in the majority, or it contradicts itself

    def order(self) -> tuple[bool, int]:
        """Smaller is likelier: who received a wrong message is a victim, and who differs first is the cause."""
        return self.what.startswith(MESSAGE), self.at


def blamed(computations: Sequence[Computation]) -> list[Blame]:
    """Who computed otherwise than the majority of ranks, the likeliest cause first.

    A wrong value travels: to later modules, and in messages to other ranks. So the first is the rank whose own
    computation differs earliest.
    """
    by_batch: dict[int, list[Computation]] = defaultdict(list)
    for one in computations:
        by_batch[one.of].append(one)
    found: dict[int, list[Blame]] = defaultdict(list)
    for same in by_batch.values():
        voters: dict[tuple[tuple[str, int], ...], set[int]] = defaultdict(set)
        for one in same:
            voters[tuple(one.traced)].add(one.by)
        if len(voters) == 1:
            continue
        (right, most), (other, second), *_ = Counter({trace: len(by) for trace, by in voters.items()}).most_common()
        unsteady = {rank for rank, count in Counter(r for by in voters.values() for r in by).items() if count > 1}
        for trace, ranks in voters.items():
            if most > second and trace == right:
                continue
            at, what = first_difference(trace, right if trace != right else other)
            for rank in ranks & unsteady if most == second and unsteady else ranks:
                certain = most > second or bool(unsteady)
                found[rank].append(Blame(rank, at, what, lasting=rank not in unsteady, certain=certain))
    sure = {rank for rank, blames in found.items() if any(one.certain for one in blames)}
    firsts = [min(blames, key=Blame.order) for rank, blames in found.items() if not sure or rank in sure]
    return sorted(firsts, key=lambda one: (one.order(), one.rank))


def first_difference(one: Sequence[tuple[str, int]], other: Sequence[tuple[str, int]]) -> tuple[int, str]:
    """The number and name of the first thing in which two traces differ."""
    for number, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return number, mine[0]
    return min(len(one), len(other)), "the number of calls"


def replay_finding(step: int, computations: Sequence[Computation], every: int = 1) -> Finding:
    """The finding of a replay whose traces differ, from both rounds; the replay before was ``every`` steps ago."""
    found = blamed(computations)
    if not found:
        everyone = tuple(sorted({one.by for one in computations}))
        detail = "differed in a replay, and the second round's computations agree on no rank"
        since = max(1, step - every)
        return Finding("replay", step, "the step's computation", everyone, detail=detail, since=since)
    first = found[0]
    suspects = tuple(one.rank for one in found if one.order() == first.order())
    if not first.certain:
        nature = "they disagree in every repetition, so one of them is defective for good"
    elif first.lasting:
        nature = "the fault is lasting"
    else:
        nature = "the fault is transient"
    detail = f"has other bits than when another rank computes the same micro-batches; {nature}"
    since = max(1, step - every) if first.lasting else step
    return Finding("replay", step, first.what, suspects, layer_of(first.what), first.what, "", detail, since)
