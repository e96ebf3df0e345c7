"""Turns: few ranks read the heartbeats of all, and the others wait for what these announce.

One reading of n heartbeats costs the store n values. If each of n ranks read them, a diagnosis would take the square of
that: an hour of the store's thread for 10,240 ranks.
"""

from __future__ import annotations

import time

from parallel.watchdog.heartbeats import HeartbeatStore

READERS = 2  # that read at a time, so that nothing waits for one that is lost


class Turn:
    """The right to read all heartbeats, which `READERS` ranks have until they give it back or their heartbeats stop.

    Methods raise what a lost store raises.

    Args:
        purpose: what the reading is for; there are `READERS` turns for each.
    """

    def __init__(self, store: HeartbeatStore, purpose: str) -> None:
        self.store = store
        self.key = f"{store.prefix}/turn/{purpose}/{store.rank % READERS}"
        self.requests_key = f"{store.prefix}/turn/{purpose}/requests"
        self.is_held = False
        self.due = 0.0  # of `time.monotonic`: when the holder reads again although no rank asks it to
        self.wait: float | None = None  # for which this rank has asked
        self.requests = -1  # that the holder has seen
        self.seen: tuple[str, int] | None = None  # another holder and the count of its heartbeats
        self.seen_since = 0.0

    def take(self, wait: float, confirm: float) -> bool:
        """Whether this rank is to read all heartbeats now.

        Ranks that do not get the turn ask its holder, once for each wait, for one more reading.

        Args:
            wait: when this rank's wait began, by its own clock.
            confirm: a holder without a heartbeat for so many seconds has stopped and loses the turn.
        """
        own = str(self.store.rank)
        holder = self._replace("", own)
        if holder != own and self._has_stopped(holder, confirm):
            holder = self._replace(holder, own)
        self.is_held = holder == own
        is_new, self.wait = wait != self.wait, wait
        if not self.is_held:
            if is_new:
                self.store.reading.add(self.requests_key, 1)
            return False
        before, self.requests = self.requests, self.store.reading.add(self.requests_key, 0)
        return is_new or before != self.requests or time.monotonic() >= self.due

    def release(self) -> None:
        """Give the turn back: this rank's wait has ended."""
        self._replace(str(self.store.rank), "")
        self.is_held = False

    def _replace(self, holder: str, other: str) -> str:
        """Pass the turn on if it is ``holder``'s, "" for nobody; returns whose it is then."""
        return self.store.reading.compare_set(self.key, holder, other).decode()

    def _has_stopped(self, holder: str, confirm: float) -> bool:
        """Whether this rank has seen the same heartbeat of the holder for ``confirm`` seconds, by its own clock."""
        seen, now = (holder, self.store.heartbeat_of(int(holder)).count), time.monotonic()
        if seen != self.seen:
            self.seen, self.seen_since = seen, now
        return now - self.seen_since > confirm
