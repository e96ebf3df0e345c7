"""What the device has done: for each process group, how many waits the host has issued and how many are completed.

On a GPU the host runs ahead: it leaves the wait for a collective as soon as that is queued, and stops at the next
number that it needs, perhaps in another group's wait. Which rank has not issued a collective that others wait for is
then in no span; it is in these counts, which all ranks of a group make in the same order. Messages between two ranks
are counted by direction: sender and receiver issue them in the same order.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist

from parallel.watchdog.wait_graph import decode_ranks, encode_ranks

KEPT = 64  # marks of a group before the host looks which are completed


class Mark(Protocol):
    """A place in the device's queue."""

    def query(self) -> bool:
        """Whether the device has come past it. Does not wait."""


class GroupProgress(NamedTuple):
    """Of one process group on one rank."""

    name: str
    ranks: str  # as `encode_ranks` writes them
    issued: int
    completed: int

    @property
    def group(self) -> tuple[str, str]:
        """Equal on all members."""
        return self.name, self.ranks


class _Counts:
    def __init__(self, name: str, ranks: str) -> None:
        self.name, self.ranks = name, ranks
        self.issued = self.waits = 0
        self.marks: deque[Mark] = deque()
        self._lock = threading.Lock()

    def look(self) -> None:
        """Count what is completed; called by the training thread and by the watchdog's."""
        with self._lock:
            while self.marks and self.marks[0].query():
                self.marks.popleft()

    def wait(self, mark: Mark) -> None:
        """The host has queued a wait; ``mark`` is behind it."""
        self.waits += 1
        self.marks.append(mark)
        if len(self.marks) > KEPT:
            self.look()

    def now(self) -> GroupProgress:
        """Where the device waits for nothing, all that is issued counts as completed."""
        self.look()
        waiting = len(self.marks)
        return GroupProgress(self.name, self.ranks, self.issued, self.waits - waiting if waiting else self.issued)


class DeviceProgress:
    """Counts of this rank. ``mark`` makes a mark behind what is queued now."""

    def __init__(self, mark: Callable[[], Mark]) -> None:
        self._mark = mark
        self._counts: dict[dist.ProcessGroup | tuple[int, int], _Counts] = {}

    def issued(self, group: dist.ProcessGroup) -> None:
        """The host has queued a collective of this group, and the wait for it."""
        counts = self._counts.get(group)
        if counts is None:
            ranks = encode_ranks(dist.get_process_group_ranks(group))
            counts = self._counts[group] = _Counts(group.group_desc, ranks)
        counts.issued += 1
        counts.wait(self._mark())

    def message_issued(self, sender: int, receiver: int) -> None:
        """The host has queued sending or receiving a message; the ranks are global ones."""
        self._messages(sender, receiver).issued += 1

    def message_awaited(self, sender: int, receiver: int) -> None:
        """The host has queued the wait for the next of these messages."""
        self._messages(sender, receiver).wait(self._mark())

    def _messages(self, sender: int, receiver: int) -> _Counts:
        counts = self._counts.get((sender, receiver))
        if counts is None:
            counts = _Counts(f"messages from rank {sender}", encode_ranks([sender, receiver]))
            self._counts[sender, receiver] = counts
        return counts

    def now(self) -> tuple[GroupProgress, ...]:
        """Called by the watchdog's thread."""
        return tuple(counts.now() for counts in list(self._counts.values()))


def cuda_progress() -> DeviceProgress:
    """Marks are events on the stream that the host uses."""

    def mark() -> Mark:
        event = torch.cuda.Event()
        event.record()
        return event

    return DeviceProgress(mark)


class Behind(NamedTuple):
    """Ranks that have not issued what others' devices wait for."""

    ranks: tuple[int, ...]  # the end of the chain
    group: GroupProgress  # of a rank that waits for them
    waiting: tuple[int, ...]


class GroupCounts:
    """The counts of all ranks, by group."""

    def __init__(self, progress: Mapping[int, tuple[GroupProgress, ...]]) -> None:
        self.progress = progress
        self.groups: dict[tuple[str, str], dict[int, GroupProgress]] = {}  # with those of the members that have it
        for rank, counts in progress.items():
            for own in counts:
                self.groups.setdefault(own.group, {})[rank] = own
        self._behind: dict[tuple[str, str, int], Behind | None] = {}  # by group and what is completed

    def issued(self, group: tuple[str, str]) -> dict[int, int]:
        """Of each member that has counts: 0 where it has none of this group."""
        theirs, members = self.groups[group], decode_ranks(group[1]) & self.progress.keys()
        return {rank: theirs[rank].issued if rank in theirs else 0 for rank in members}

    def find_behind(self, start: int) -> Behind | None:
        """Follow ``start``, whose device waits, to ranks that have not issued the collective and wait for none.

        None if no group of ``start`` lacks a rank, or the chain leads back.
        """
        seen, rank, found = {start}, start, None
        while True:
            step = self._lacking(rank)
            if step is None:
                return found
            found = step
            further = [one for one in step.ranks if one not in seen and self._lacking(one) is not None]
            if not further or any(self._lacking(one) is None for one in step.ranks):
                own = tuple(one for one in step.ranks if self._lacking(one) is None)
                return step._replace(ranks=own) if own else None
            rank = further[0]
            seen.add(rank)

    def _lacking(self, rank: int) -> Behind | None:
        """The group in which this rank's device waits for the furthest behind, with those that have issued less."""
        waiting = (own for own in self.progress.get(rank, ()) if own.completed < own.issued)
        found = [behind for own in waiting if (behind := self._behind_in(own)) is not None]
        return min(found, key=lambda behind: len(behind.ranks), default=None)

    def _behind_in(self, own: GroupProgress) -> Behind | None:
        key = (*own.group, own.completed)
        if key not in self._behind:
            issued = self.issued(own.group)
            behind = tuple(sorted(rank for rank, count in issued.items() if count <= own.completed))
            waiting = tuple(sorted(rank for rank, count in issued.items() if count > own.completed))
            self._behind[key] = Behind(behind, own, waiting) if behind else None
        return self._behind[key]

    def stuck_group(self) -> GroupProgress | None:
        """A group whose members have all issued a collective that none of them has completed."""
        for group, theirs in self.groups.items():
            least = min(self.issued(group).values())
            if all(one.completed < least for one in theirs.values()):
                return next(iter(theirs.values()))
        return None
