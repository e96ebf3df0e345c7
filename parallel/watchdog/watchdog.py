"""The watchdog: when ranks wait too long for each other, one message says which rank delays them, and all end.

A thread writes each rank's open spans (parallel/watchdog/spans.py) to the process group's store about once a second.
When a collective has been waited for long, a few of the waiting ranks (parallel/watchdog/turns.py) read the heartbeats
of all, parallel/watchdog/diagnosis.py finds the rank that delays the others, they announce it, and all processes end:
Python cannot interrupt a collective that is stuck in C++. This begins early enough that all processes have ended after
`parallel.timeout_seconds` (`Timing`).

On GPUs NCCL's flight recorder runs too, and a hang writes its record to the run's folder. That part has never run on a
GPU: kernels wait there, not the host, so a hang shows at the host's next wait for the device.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from longcat.errors import CRASHED
from parallel.mesh import BACKGROUND, ask_store
from parallel.reduce import broadcast
from parallel.torch_internals import default_store, process_groups, set_group_timeout
from parallel.watchdog.diagnosis import Diagnosis, HangCause, as_finding, diagnose, diagnoses, format_message, reporter
from parallel.watchdog.errors import causes, find_lost_rank, first_sentence
from parallel.watchdog.events import Event, RankState, SpanKind
from parallel.watchdog.flight_recorder import dump_flight_record, flight_record_path
from parallel.watchdog.heartbeats import Announcement, Heartbeat, HeartbeatStore, has_ended, this_machine, within
from parallel.watchdog.progress import DeviceProgress, cuda_progress
from parallel.watchdog.spans import SPANS, group_text, status, wait_span
from parallel.watchdog.timing import GROUP_FACTOR, Timing, max_wait_seconds
from parallel.watchdog.turns import Turn

Look = tuple[dict[int, Heartbeat], Diagnosis | None]  # the heartbeats of the ranks that were read, what they say


class Watchdog:
    """Publishes this rank's spans, and ends the process when ranks have waited for ``timeout_seconds``.

    Args:
        on_hang: called with the message, from a thread, just before the process ends with code 1.
        record: file for NCCL's flight record of a hang; None without a GPU.
    """

    def __init__(
        self,
        store: HeartbeatStore,
        timeout_seconds: float,
        on_hang: Callable[[str], None],
        record: Path | None = None,
    ) -> None:
        self.store, self.on_hang, self.record = store, on_hang, record
        self.timing = Timing.of(timeout_seconds, store.world_size)
        self.machine = this_machine()
        self.neighbours: dict[int, Heartbeat] = {}  # of the ranks on this machine, when a wait got long
        self.count = 0  # of heartbeats
        self.stopped = threading.Event()
        self.wait_turn, self.failure_turn = Turn(store, "wait"), Turn(store, "failure")
        self.announced = threading.Event()  # a rank has announced a diagnosis
        self.announcement: Announcement | None = None
        self.ending = threading.RLock()  # one thread at a time decides how the run ends
        self.finding: dict[str, Any] | None = None  # the diagnosis, for exit.json
        self.threads = [
            threading.Thread(target=target, daemon=True, name=name)
            for name, target in (("watchdog-heartbeat", self._publish), ("watchdog-check", self._check))
        ]

    def start(self) -> None:
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """End the threads. Those that a lost store blocks are abandoned."""
        self.stopped.set()
        for thread in set(self.threads) - {threading.current_thread()}:
            thread.join(timeout=2 * self.timing.heartbeat)

    def heartbeat(self) -> Heartbeat:
        """What this rank does now."""
        now = status()
        return Heartbeat(
            rank=self.store.rank,
            count=self.count,
            timestamp=time.time(),
            step=SPANS.step,
            sequence=SPANS.sequence,
            state=now.state,
            event=now.event,
            ranks=group_text(now.group),
            phase=now.phase,
            last_wait=SPANS.last_wait,
            idle_seconds=now.idle_seconds,
            slow_seconds_ago=now.slow_seconds_ago,
            machine=self.machine,
            pid=os.getpid(),
            groups=SPANS.progress.now() if isinstance(SPANS.progress, DeviceProgress) else (),
        )

    def explain(self, error: BaseException) -> str | None:
        """One line for an error that a lost rank or a time-out caused; None for any other error.

        The diagnosis takes as long as confirming that a rank has stopped, less where the lost process ran on this
        machine. Few ranks make it, and print the traceback unless a rank has died; the others wait for these.
        """
        if (lost := find_lost_rank(error)) is None:
            return None
        with self.ending:
            if SPANS.failed is None or SPANS.failed[0] not in causes(error):
                span = SPANS.failed[1] if SPANS.failed else wait_span(Event(SpanKind.UNTRACED))
                SPANS.failed = (error, span)
            SPANS.innermost = None  # this thread has left every span
            began, look = time.monotonic(), None
            while look is None and not self.announced.is_set():
                look = self._look(self.failure_turn, began, lambda: not self.announced.is_set())
                if look is None:
                    self._pause(lambda: not self.announced.is_set(), self.timing.heartbeat)
            if self.announcement is not None or look is None:
                return self._heard()
            heartbeats, found = look
            diagnosis = found or Diagnosis(HangCause.UNKNOWN, (), "every rank answers", "check their network")
            message = f"{format_message(heartbeats.get(self.store.rank), diagnosis)} ({first_sentence(lost)})"
            self.finding = as_finding(diagnosis, heartbeats)
            if diagnosis.cause != HangCause.DEAD:  # else its end explains the error
                sys.excepthook(type(error), error, error.__traceback__)  # before the processes end
            self._announce(message, heartbeats, diagnosis)
            return message

    def _publish(self) -> None:
        while not self.stopped.wait(self.timing.heartbeat):
            self.count += 1
            try:
                announced = self.store.publish(self.heartbeat())
                self.store.cache_rank_0()
            except (RuntimeError, OSError, ValueError):
                return  # reported when a wait gets too long; each further try would log a page of text
            if announced is not None and not self.stopped.is_set():
                self.announcement = announced
                self.announced.set()
                with self.ending:
                    self._end(self._heard())

    def _check(self) -> None:
        pause = self.timing.heartbeat / 4
        while not self.stopped.wait(pause):
            last_change, pause = SPANS.last_change, self.timing.heartbeat / 4
            if time.monotonic() - last_change > self.timing.investigate:
                with self.ending:
                    pause = self._investigate(last_change)
            elif self.wait_turn.is_held:
                within(self.timing.heartbeat, self.wait_turn.release)

    def _investigate(self, last_change: float) -> float:
        """End the run if a rank has waited for too long, or a rank is lost that no rank waits for.

        Returns the seconds until the next check.
        """
        timing = self.timing

        def still_idle() -> bool:
            return SPANS.last_change == last_change and not self.stopped.is_set() and not self.announced.is_set()

        look = self._look(self.wait_turn, last_change, still_idle)
        if look is None or not still_idle():
            return timing.heartbeat
        heartbeats, own = look
        pause = timing.timeout / 16  # long work is no fault: spare the store
        for rank, diagnosis in diagnoses(self.store.rank, own, heartbeats, timing.investigate):
            pause = min(pause, self._end_if_over(rank, diagnosis, heartbeats))
        self.wait_turn.due = time.monotonic() + pause
        return min(pause, timing.heartbeat)

    def _end_if_over(self, rank: int, diagnosis: Diagnosis, heartbeats: dict[int, Heartbeat]) -> float:
        """End the run if ``rank``, from whose wait the diagnosis begins, has waited for too long, or a rank is lost.

        Returns the seconds until the next reading.
        """
        timing = self.timing
        reporting = reporter(rank, heartbeats, diagnosis)
        slow_ago = min(heartbeats[rank].slow_seconds_ago for rank in diagnosis.ranks or heartbeats)
        is_over = (
            reporting is not None
            and reporting.state == RankState.WAITING
            and self._too_long(reporting.idle_seconds, slow_ago, diagnosis)
        )
        # Torch waits outside of spans, too, and a rank that does not answer for a moment is not lost
        last = min((heartbeats[rank].timestamp for rank in diagnosis.ranks), default=time.time())
        is_silent = diagnosis.cause == HangCause.UNRESPONSIVE and time.time() - last > timing.investigate
        if is_over or is_silent or diagnosis.cause == HangCause.DEAD:
            message = format_message(reporting or heartbeats[self.store.rank], diagnosis)
            self.finding = as_finding(diagnosis, heartbeats)
            self._end(message, lambda: self._announce(message, heartbeats, diagnosis))
        if diagnosis.cause == HangCause.UNRESPONSIVE:
            return timing.heartbeat
        return timing.investigate - slow_ago if 0 < slow_ago < timing.investigate else float("inf")

    def _too_long(self, seconds: float, slow_ago: float, diagnosis: Diagnosis) -> bool:
        """Whether a wait of ``seconds`` ends the run; the diagnosed rank was in a slow span ``slow_ago`` seconds ago.

        A rank that answers has `SLOW_FACTOR` time-outs, and the usual one after its slow span; one that does not, the
        usual one after its last heartbeat, since slow work may keep it from answering for a moment.
        """
        if slow_ago <= self.timing.investigate:
            may_be_slow = diagnosis.cause in (HangCause.STRAGGLER, HangCause.UNKNOWN, HangCause.STORE_LOST)
            return may_be_slow and seconds > self.timing.slow_limit
        return seconds > self.timing.investigate

    def _look(self, turn: Turn, wait: float, still_idle: Callable[[], bool]) -> Look | None:
        """What this machine's processes say, or all heartbeats; None where it is not this rank's turn to read them.

        Args:
            wait: when this rank's wait began.
        """
        this_rank, confirm, is_new = self.store.rank, self.timing.confirm, wait != turn.wait
        if self.store.at_rank_0 and 0 in self._dead(self.store.known):
            return self._diagnose_without_store()

        def ask() -> bool:
            if is_new or self._dead(self.neighbours):
                self.neighbours = self.store.read_machine(self.machine)
            return not self._dead(self.neighbours) and turn.take(wait, confirm)

        is_ours = within(confirm, ask)
        if is_ours is None:
            return self._diagnose_without_store()
        if dead := self._dead(self.neighbours):  # whoever sees it needs no other heartbeats
            heartbeats = self.neighbours | {this_rank: self.heartbeat()}
            return heartbeats, diagnose(this_rank, heartbeats, set(), dead, time.time())
        return self._diagnose(still_idle) if is_ours else None

    def _pause(self, still_idle: Callable[[], bool], seconds: float) -> None:
        """Wait for so long, or until a process of this machine is known to have ended."""
        until = time.monotonic() + seconds
        while still_idle() and time.monotonic() < until and not self._dead(self.store.known):
            time.sleep(self.timing.heartbeat / 10)

    def _diagnose(self, still_idle: Callable[[], bool]) -> Look:
        """Read all heartbeats, twice if no process is known to have ended, and find the rank that delays the others."""
        this_rank, seconds = self.store.rank, self.timing.confirm
        first = self.store.read(seconds)
        if first is None:
            return self._diagnose_without_store()
        self._pause(still_idle, seconds)
        dead = self._dead(first)
        second = self.store.read(seconds)
        if second is None:
            return self._diagnose_without_store()
        second[this_rank] = self.heartbeat()
        unresponsive = {rank for rank in first if rank != this_rank and second[rank].count == first[rank].count}
        return second, diagnose(this_rank, second, set() if dead else unresponsive, dead, time.time())

    def _dead(self, heartbeats: dict[int, Heartbeat]) -> set[int]:
        return {
            rank
            for rank, heartbeat in heartbeats.items()
            if rank != self.store.rank and has_ended(heartbeat, self.machine)
        }

    def _diagnose_without_store(self) -> Look:
        """The store does not answer: its host delays the others, as far as the last heartbeats say."""
        heartbeats = self.store.known | {self.store.rank: self.heartbeat()}
        dead = self._dead(heartbeats)
        unresponsive = {0} & self.store.known.keys() - {self.store.rank} if self.store.at_rank_0 and not dead else set()
        found = diagnose(self.store.rank, heartbeats, unresponsive, dead, time.time()) if unresponsive | dead else None
        host = "rank 0" if self.store.at_rank_0 else "the launcher on the first host"
        lost = f"{host}, which holds the heartbeat store, does not answer"
        if found is None:
            return heartbeats, Diagnosis(HangCause.STORE_LOST, (), lost, "look at its process and machine")
        return heartbeats, Diagnosis(found.cause, found.ranks, f"{found.reason}; {lost}", found.advice)

    def _announce(self, message: str, heartbeats: dict[int, Heartbeat], diagnosis: Diagnosis) -> None:
        """Tell the other ranks; kill those on this machine that have stopped and cannot hear it."""
        unresponsive = diagnosis.ranks if diagnosis.cause == HangCause.UNRESPONSIVE else ()
        if not (self.store.at_rank_0 and 0 in diagnosis.ranks):  # else the store's host has stopped or died
            self.store.announce(Announcement(message, as_finding(diagnosis, heartbeats)))
        self._let_others_hear()
        for rank in unresponsive:
            if rank in heartbeats and heartbeats[rank].machine == self.machine:
                with contextlib.suppress(OSError):
                    os.kill(heartbeats[rank].pid, signal.SIGKILL)  # torchrun would wait half a minute for it

    def _heard(self) -> str:
        """The message that another rank has announced."""
        assert self.announcement is not None
        self.finding = self.announcement.finding
        self._let_others_hear()
        return self.announcement.message

    def _let_others_hear(self) -> None:
        if self.store.at_rank_0 and self.store.rank == 0:
            time.sleep(1.5 * self.timing.heartbeat)  # the store ends with this process

    def _end(self, message: str, announce: Callable[[], None] = lambda: None) -> None:
        """Report the message and end this process."""
        if self.stopped.is_set():
            return
        try:
            self.on_hang(message)
            announce()
            if self.record is not None:
                dump_flight_record(self.record)
        finally:
            exit_process(CRASHED)


def exit_process(code: int) -> NoReturn:
    """End this process at once: its process group may be unable to shut down in an orderly way."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


_current: Watchdog | None = None


def start(timeout_seconds: float, on_hang: Callable[[str], None], folder: Path) -> None:
    """Watch this rank from here to `stop`; does nothing in a run of one rank. All ranks call it when they have met.

    Args:
        timeout_seconds: how long a wait span may take.
        on_hang: is given the message; called from a thread, and the process ends when it returns.
        folder: the run's, for NCCL's flight records.

    Raises:
        SilentStoreError: the store does not answer in time.
    """
    global _current
    stop()
    SPANS.clear()
    SPANS.progress = cuda_progress() if torch.cuda.is_available() else None
    if dist.get_world_size() == 1:
        return
    rank = dist.get_rank()
    record = flight_record_path(folder, rank) if torch.cuda.is_available() else None
    # Not the agent's restart count: that stays the same when nodes come or go
    incarnation = broadcast(uuid.uuid4().hex)

    def published() -> Watchdog:
        store = HeartbeatStore(default_store(), rank, dist.get_world_size(), incarnation)
        found = Watchdog(store, timeout_seconds, on_hang, record)
        store.publish(found.heartbeat())  # so that the others can name this rank
        store.register(found.machine)
        return found

    _current = ask_store(published, timeout_seconds)
    set_timeout(timeout_seconds)
    _current.start()


def set_timeout(timeout_seconds: float) -> None:
    """Limit waits from here on, and torch's own collectives too: a mesh's groups come with half an hour."""
    _set_group_timeouts(timeout_seconds * GROUP_FACTOR)
    if _current is not None:
        _current.timing = Timing.of(timeout_seconds, _current.store.world_size)


def _set_group_timeouts(seconds: float) -> None:
    for group in process_groups():
        if group.group_desc != BACKGROUND:
            set_group_timeout(group, seconds)


@contextlib.contextmanager
def slow_timeout() -> Iterator[None]:
    """Collectives that begin inside wait for ranks in slow spans: their groups do not give up before the watchdog."""
    if _current is not None:
        _set_group_timeouts(max_wait_seconds(_current.timing.timeout))
    try:
        yield
    finally:
        if _current is not None:
            _set_group_timeouts(_current.timing.timeout * GROUP_FACTOR)


def stop() -> None:
    """Stop the watchdog, if one runs."""
    global _current
    if _current is not None:
        _current.stop()
    _current = None


def finding() -> dict[str, Any] | None:
    """What this rank's diagnosis says for machines (`as_finding`); None before one."""
    return None if _current is None else _current.finding


def explain(error: BaseException) -> str | None:
    """`Watchdog.explain` of the one that runs; None without one."""
    return None if _current is None else _current.explain(error)
