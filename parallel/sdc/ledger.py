"""Checksums of what ranks send each other in a step, at both ends, compared without a message of their own.

A sender adds a number made of each checksum to the receiver's cell and to its own, and the receiver subtracts its
number from both. The step's collective sums the cells of all ranks, modulo 2^40 as exact integers in float64: a cell
that is not zero names a rank. Only then do ranks exchange the lists of what those ranks sent, which name the transfer.
A difference is missed with probability 2^-40.

Each rank keeps one ledger, `LEDGER`. Transfers outside a step, of validation for example, are not recorded. It has one
record for each end of a collective or gathered tensor, however many ranks take part: their checksums are a vector.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from longcat.errors import LocalCorruptionError
from longcat.faults import Place, is_active, passed
from parallel.checksum import Digests, Words, digest, digests, fetched, mix
from parallel.sdc.finding import Finding, Site, layer_of

Parts = Tensor | Sequence[Tensor]
Peers = Sequence[int] | NDArray[np.int64]
RECEIVED = "received "  # begins the name of a traced arrival


def modulus(world_size: int) -> int:
    """Of the cells: 2^40, or as much less as lets float64 hold the sum of one number of each rank exactly."""
    return 1 << min(40, 53 - (world_size - 1).bit_length())


class Record(NamedTuple):
    """This rank's end of transfers to or from n peers."""

    label: str  # the transfer, as a reader knows it
    channel: str  # with the number, the same at both ends
    number: int
    peers: NDArray[np.int64]  # [n] global ranks of the other ends
    checksums: Digests  # [n], or one for all peers
    is_sender: bool


class Entry(NamedTuple):
    """One end of a transfer, for the diagnosis."""

    label: str
    channel: str
    number: int
    sender: int
    receivers: tuple[int, ...]
    is_sender: bool
    checksum: int


class Ledger:
    """The transfers of this rank in the present step."""

    def __init__(self) -> None:
        self.rank = self.step = 0
        self.sites: list[Site] = []  # of all ranks; empty without checks
        self.recording = False
        self.records: list[Record] = []
        self.numbers: Counter[str] = Counter()
        self._peers: dict[tuple[str, bool], NDArray[np.int64]] = {}  # of groups, in the present step
        self.on_transfer: Callable[[str, Digests], None] | None = None  # learns what is `sent …` and `received …`

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
        self.records.clear()
        self.numbers.clear()
        self._peers.clear()

    def number(self, channel: str) -> int:
        """The number of the next transfer in a channel; both ends ask in the same order."""
        self.numbers[channel] += 1
        return self.numbers[channel]

    def send(self, label: str, channel: str, number: int, receiver: int, tensor: Tensor) -> None:
        """Record what this rank sends to a global rank. Call it while the message travels."""
        if self.watches_sends:
            self._note("sent ", label, channel, number, [receiver], digest(tensor))

    def receive(self, label: str, channel: str, number: int, sender: int, tensor: Tensor) -> None:
        """Record what has arrived from a global rank."""
        passed(Place.payload, label, tensor)
        if self.watches_sends:
            self._note(RECEIVED, label, channel, number, [sender], digest(tensor))

    def send_parts(self, label: str, group: dist.ProcessGroup, parts: Parts, sizes: Sequence[int] | None = None) -> int:
        """Record parts [n], one for each rank of a group, in a collective; returns its number for `receive_parts`.

        Parts are as in `digests`: an expanded tensor, if all get the same; rows, if ``sizes`` [n] says how many each.
        """
        if not self.watches_sends:
            return 0
        number = self.number(group.group_name)
        checksums = digests(parts, sizes, skip=group.rank())
        self._note("sent ", label, group.group_name, number, self.peers(group), checksums)
        return number

    def receive_parts(
        self,
        label: str,
        group: dist.ProcessGroup,
        number: int,
        parts: Parts,
        sizes: Sequence[int] | None = None,
    ) -> None:
        """Record the parts [n], as in `send_parts`, that have arrived from the ranks of a group."""
        own = group.rank()
        if is_active():
            rows = parts.split(list(sizes)) if sizes is not None and isinstance(parts, Tensor) else parts
            for rank, part in enumerate(rows):
                if rank != own:
                    passed(Place.payload, label, part)
        if self.watches_sends:
            checksums = digests(parts, sizes, skip=own)
            self._note(RECEIVED, label, group.group_name, number, self.peers(group), checksums)

    def _note(self, traced: str, label: str, channel: str, number: int, peers: Peers, checksums: Digests) -> None:
        if self.on_transfer is not None:
            self.on_transfer(f"{traced}{label}", checksums)
        self.put(label, channel, number, peers, checksums, is_sender=traced != RECEIVED)

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

    def put(self, label: str, channel: str, number: int, peers: Peers, checksums: Digests, is_sender: bool) -> None:
        """Record ends whose checksums are known."""
        if self.recording:
            ranks = np.asarray(peers, np.int64)
            self.records.append(Record(label, channel, number, ranks, checksums, is_sender))

    def peers(self, group: dist.ProcessGroup, with_self: bool = False) -> NDArray[np.int64]:
        """The global ranks of a group, without this one or with it."""
        key = group.group_name, with_self
        if key not in self._peers:
            ranks = np.array(group_ranks(group))
            self._peers[key] = ranks if with_self else np.delete(ranks, group.rank())
        return self._peers[key]

    def cells(self, world_size: int) -> Tensor:
        """This rank's part of the cells [world size, 2] of senders and of receivers, float64; ends recording."""
        self.recording = False
        cells = np.zeros((2, world_size), np.uint64)  # sums modulo 2^64, of which a smaller power of 2 is taken
        found = fetched([one.checksums for one in self.records])
        self.records = [one._replace(checksums=values) for one, values in zip(self.records, found, strict=True)]
        for is_sender in (True, False):
            if records := [one for one in self.records if one.is_sender == is_sender]:
                peers, values = np.concatenate([one.peers for one in records]), transfer_numbers(records, self.rank)
                here, there = (0, 1) if is_sender else (1, 0)
                add = np.add if is_sender else np.subtract
                add.at(cells[there], peers, values)
                add.at(cells[here], [self.rank], values.sum())
        return torch.from_numpy((cells.T & np.uint64(modulus(world_size) - 1)).astype(np.float64))

    def entries(self, cells: Tensor) -> list[Entry]:
        """This rank's ends of all transfers of senders whose sums of ``cells`` [world size, 2] are not zero."""
        senders = set(_differing(cells)[:, 0].nonzero().flatten().tolist())
        found: list[Entry] = []
        for one in self.records:
            for peer, checksum in zip(one.peers.tolist(), _by_peer(one).tolist(), strict=True):
                sender, receiver = (self.rank, peer) if one.is_sender else (peer, self.rank)
                if sender in senders:
                    found.append(Entry(*one[:3], sender, (receiver,), one.is_sender, checksum))
        return found


LEDGER = Ledger()


def transfer_numbers(records: list[Record], rank: int) -> Words:
    """The numbers of all transfers of a rank's records whose checksums are on the host, one after the other.

    Both ranks of a transfer are in its number: parts that arrive exchanged change the cells of their senders.
    """
    counts = [len(one.peers) for one in records]
    keys = np.array([crc32(one.channel.encode()) << 32 | one.number for one in records], np.uint64)
    peers = np.concatenate([one.peers for one in records]).astype(np.uint64)
    own = np.full_like(peers, rank)
    is_sender = np.repeat([one.is_sender for one in records], counts)
    pairs = np.where(is_sender, own << 32 | peers, peers << 32 | own)
    checksums: Words = np.concatenate([_by_peer(one) for one in records])
    return mix(checksums ^ mix(np.repeat(mix(keys), counts) ^ pairs))


def _by_peer(record: Record) -> Words:
    """The checksum of each transfer of a record whose checksums are on the host, [n]."""
    assert isinstance(record.checksums, np.ndarray)
    return np.broadcast_to(record.checksums, record.peers.shape)


def differs(cells: Tensor) -> bool:
    """Whether some transfer differs between its ends, from the sum of all ranks' cells."""
    return bool(_differing(cells).any())


def _differing(cells: Tensor) -> Tensor:
    return cells.remainder(modulus(len(cells))) != 0


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
