"""Checksums of what ranks send each other in a step, at both ends, compared without a message of their own.

A sender adds a number made of each checksum to the receiver's cell and to its own, and the receiver subtracts its
number from both. The step's collective sums the cells of all ranks, modulo 2^40 as exact integers in float64: a cell
that is not zero names a rank. Only then do ranks exchange their lists, which name the transfer. A difference is missed
with probability 2^-40.

Each rank keeps one ledger, `LEDGER`. Transfers outside a step, of validation for example, are not recorded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from longcat.errors import LocalCorruptionError
from longcat.faults import Place, is_active, passed
from parallel.checksum import Digest, digest, mix, resolve
from parallel.sdc.finding import Finding, Site, layer_of

RECEIVED = "received "  # begins the name of a traced arrival
MODULUS = 1 << 40  # the sum of 4,096 such numbers is exact in float64


class Entry(NamedTuple):
    """One end of a transfer."""

    label: str  # the transfer, as a reader knows it
    channel: str  # with the number, the same at both ends
    number: int
    sender: int
    receivers: tuple[int, ...]
    is_sender: bool
    checksum: Digest


class Ledger:
    """The transfers of this rank in the present step."""

    def __init__(self) -> None:
        self.rank = self.step = 0
        self.sites: list[Site] = []  # of all ranks; empty without checks
        self.recording = False
        self.entries: list[Entry] = []
        self.numbers: Counter[str] = Counter()
        self.on_transfer: Callable[[str, Digest], None] | None = None  # learns what is `sent …` and `received …`

    @property
    def watches_sends(self) -> bool:
        """Whether what this rank sends is recorded or traced."""
        return self.recording or self.on_transfer is not None

    @property
    def is_watching(self) -> bool:
        """Whether what arrives is recorded or traced, or may be struck by an injected fault."""
        return self.watches_sends or is_active()

    def begin(self, rank: int, step: int, recording: bool) -> None:
        """Forget the last step; record from now on, or not."""
        self.rank, self.step, self.recording = rank, step, recording
        self.entries.clear()
        self.numbers.clear()

    def number(self, channel: str) -> int:
        """The number of the next transfer in a channel; both ends ask in the same order."""
        self.numbers[channel] += 1
        return self.numbers[channel]

    def send(self, label: str, channel: str, number: int, receivers: Sequence[int], tensor: Tensor) -> None:
        """Record what this rank sends to ``receivers``, global ranks. Call it while the message travels."""
        if self.watches_sends:
            self._put(f"sent {label}", Entry(label, channel, number, self.rank, tuple(receivers), True, digest(tensor)))

    def receive(self, label: str, channel: str, number: int, sender: int, tensor: Tensor) -> None:
        """Record what has arrived from a global rank."""
        passed(Place.payload, label, tensor)
        if self.watches_sends:
            self._put(f"{RECEIVED}{label}", Entry(label, channel, number, sender, (self.rank,), False, digest(tensor)))

    def _put(self, traced: str, entry: Entry) -> None:
        if self.on_transfer is not None:
            self.on_transfer(traced, entry.checksum)
        self.put(entry)

    def send_parts(self, label: str, group: dist.ProcessGroup, parts: Sequence[Tensor] | Tensor) -> int:
        """Record parts [n], one for each rank of a group, in a collective; returns its number for `receive_parts`."""
        if not self.watches_sends:
            return 0
        channel, ranks, own = group.group_name, group_ranks(group), group.rank()
        number = self.number(channel)
        for rank, part in enumerate(parts):
            if rank != own:
                self.send(label, channel, number, [ranks[rank]], part)
        return number

    def receive_parts(
        self, label: str, group: dist.ProcessGroup, number: int, parts: Sequence[Tensor] | Tensor
    ) -> None:
        """Record the parts [n] that have arrived from the ranks of a group."""
        if self.is_watching:
            ranks, own = group_ranks(group), group.rank()
            for rank, part in enumerate(parts):
                if rank != own:
                    self.receive(label, group.group_name, number, ranks[rank], part)

    def corrupt(
        self, label: str, sender: int, detail: str = "arrived with other bits than were sent"
    ) -> LocalCorruptionError:
        """The error for a message from a global rank, perhaps this one, that something contradicts."""
        ranks = tuple(dict.fromkeys((sender, self.rank)))
        sites = self.sites
        if len(sites) <= max(ranks):  # none are known without checks
            sites = [Site(rank, "host not known", "device not known") for rank in range(max(ranks) + 1)]
        finding = Finding("message", self.step, label, ranks, layer_of(label), operator=label, detail=detail)
        error = finding.error(sites)
        return LocalCorruptionError(str(error), error.details["finding"])

    def put(self, entry: Entry) -> None:
        """Record an end whose checksum is known."""
        if self.recording:
            self.entries.append(entry)

    def cells(self, world_size: int) -> Tensor:
        """This rank's part of the cells [world size, 2] of senders and of receivers, float64; ends recording."""
        self.recording = False
        cells = [[0, 0] for _ in range(world_size)]
        self.entries = resolved(self.entries)
        for one in self.entries:
            assert isinstance(one.checksum, int)
            value = mix(one.checksum ^ mix(crc32(one.channel.encode()) << 32 | one.number))
            sign = 1 if one.is_sender else -1
            cells[one.sender][0] += sign * value * len(one.receivers)
            for receiver in one.receivers:
                cells[receiver][1] += sign * value
        return torch.tensor([[value % MODULUS for value in row] for row in cells], dtype=torch.float64)


LEDGER = Ledger()


def resolved(entries: list[Entry]) -> list[Entry]:
    """The entries with their checksums as numbers."""
    checksums = resolve(entry.checksum for entry in entries)
    return [entry._replace(checksum=checksum) for entry, checksum in zip(entries, checksums, strict=True)]


def differs(cells: Tensor) -> bool:
    """Whether some transfer differs between its ends, from the sum of all ranks' cells."""
    return any(int(value) % MODULUS for value in cells.flatten().tolist())


class Mismatch(NamedTuple):
    """A transfer of which the receiver has something else than its sender."""

    label: str
    channel: str
    sender: int
    receivers: tuple[int, ...]  # those that differ
    agreeing: int  # receivers that have what was sent


def mismatches(lists: Iterable[list[Entry]]) -> list[Mismatch]:
    """The transfers that differ, from the lists of all ranks."""
    sent: dict[tuple[str, int, int, int], Entry] = {}  # by channel, number, sender and receiver
    arrived: dict[tuple[str, int, int], list[Entry]] = {}
    for one in (entry for entries in lists for entry in entries):
        key = (one.channel, one.number, one.sender)
        if one.is_sender:
            sent |= {(*key, receiver): one for receiver in one.receivers}
        else:
            arrived.setdefault(key, []).append(one)
    found = []
    for key, entries in arrived.items():
        sources = [sent.get((*key, one.receivers[0])) for one in entries]
        pairs = list(zip(entries, sources, strict=True))
        wrong = [one for one, source in pairs if source is None or one.checksum != source.checksum]
        if wrong:
            receivers = tuple(sorted(one.receivers[0] for one in wrong))
            values = {source.checksum for one, source in pairs if source is not None and one in wrong}
            agreeing = sum(source is not None and source.checksum in values for _, source in pairs) - len(wrong)
            found.append(Mismatch(wrong[0].label, key[0], key[2], receivers, max(agreeing, 0)))
    received = {(*key, one.receivers[0]) for key, entries in arrived.items() for one in entries}
    for (channel, _, sender, receiver), source in sent.items():
        if (channel, source.number, sender, receiver) not in received:
            found.append(Mismatch(source.label, channel, sender, (receiver,), 0))
    return found


def suspects(mismatch: Mismatch) -> tuple[int, ...]:
    """Who is likely at fault: a sender that several receivers contradict, else a receiver that alone differs."""
    others = tuple(rank for rank in mismatch.receivers if rank != mismatch.sender)
    if mismatch.sender in mismatch.receivers and not mismatch.agreeing:
        return (mismatch.sender, *others)
    if len(mismatch.receivers) == 1 and mismatch.agreeing:
        return mismatch.receivers
    return (mismatch.sender, *others) if len(others) > 1 else (*others, mismatch.sender)


def group_ranks(group: dist.ProcessGroup) -> list[int]:
    """The global ranks of a group, by their rank in it."""
    return dist.get_process_group_ranks(group)
