"""The watch: when ranks wait too long for each other, one line says who holds them up, and all end.

Each rank's newest crumb (parallel/watchdog/spans.py) goes to the ranks' store about once a second, from a thread.
When an exchange has been waited for long, all ranks' crumbs are read, parallel/watchdog/diagnosis.py decides who is
to blame, and the process ends: a collective that is stuck in C++ cannot be interrupted from Python. The looking
begins so early that all have ended when `parallel.timeout_seconds` are over (`Pace`).

On GPUs NCCL's flight recorder is on beside it, and a hang leaves its record in the run's folder. That part has never
run on a GPU here: kernels wait there, not the host, so a hang shows at the host's next wait for the device.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from longcat.errors import CRASHED
from parallel.mesh import BESIDE
from parallel.torch_internals import default_store, process_groups, set_group_timeout
from parallel.watchdog import spans
from parallel.watchdog.diagnosis import (
    DEAD,
    STRAGGLER,
    UNKNOWN,
    UNRESPONSIVE,
    WAITS,
    Diagnosis,
    Heartbeat,
    diagnose,
    format_message,
    reporter,
)
from parallel.watchdog.flight_recorder import dump_flight_record, flight_record_path
from parallel.watchdog.heartbeats import HeartbeatStore, has_ended, this_machine
from parallel.watchdog.spans import SPANS, wait_span
from parallel.watchdog.wait_graph import encode_ranks

SLOW_FACTOR = 6  # times the time-out: how long a rank in a slow phase, writing a checkpoint, may be waited for
GROUP_FACTOR = 1.25  # times the time-out: when the process groups give up, where no crumb is or no thread runs
RANKS_PER_SECOND = 2000  # signs a second that the store is to bear
# What gloo, NCCL and the store say when a rank is lost or an exchange takes too long
LOST = (
    "closed by peer",
    "reset by peer",
    "broken pipe",
    "timed out",
    "timeout",
    "connection refused",
    "remote process exited",
    "nccl communicator was aborted",
    "unhandled system error",
    "application timeout caused pair closure",
)


@dataclass(frozen=True)
class Pace:
    """How the time-out is spent: waiting, then being certain of silence, then telling all and ending.

    Measured with 3 ranks on two idle cores: exit.json stands 0.02 s after silence is certain (noticing, two readings,
    judging, writing), the last process ends 0.2 s later. The rest of what is kept back is for busy cores.
    """

    timeout: float
    beat: float  # between signs
    silence: float  # a rank whose sign stands still for as long has stopped
    look: float  # a wait that is as long is looked into

    @classmethod
    def of(cls, timeout: float, world_size: int) -> Pace:
        beat = max(min(1.0, timeout / 40), world_size / RANKS_PER_SECOND)
        silence = max(2.5 * beat, min(1.0, timeout / 5))
        ending = 3 * beat + min(1.0, timeout / 5)
        return cls(timeout, beat, silence, max(timeout - silence - ending, timeout / 2))

    @property
    def slow_look(self) -> float:
        """The same where the rank that is waited for may take long."""
        return self.look + (SLOW_FACTOR - 1) * self.timeout


class Watchdog:
    """Publishes this rank's crumbs and ends the process when ranks wait as long as ``timeout_seconds``.

    Args:
        on_hang: called with the line, from a thread, just before the process ends with code 1.
        record: file that gets NCCL's flight record on a hang; None without a GPU.
    """

    def __init__(
        self,
        store: HeartbeatStore,
        timeout_seconds: float,
        on_hang: Callable[[str], None],
        record: Path | None = None,
    ) -> None:
        self.store, self.on_hang, self.record = store, on_hang, record
        self.pace = Pace.of(timeout_seconds, store.world_size)
        self.machine = this_machine()
        self.beat = 0
        self.stopped = threading.Event()
        self.told = threading.Event()  # another rank has given the verdict
        self.ending = threading.RLock()  # one thread at a time says how the run ends
        self.threads = [
            threading.Thread(target=target, daemon=True, name=name)
            for name, target in (("watch-signs", self._give_signs), ("watch-judge", self._look))
        ]

    def start(self) -> None:
        self.store.publish(self.heartbeat())
        for thread in self.threads:
            thread.start()

    def stop(self) -> None:
        """No more signs and no more verdicts. Threads that a lost store holds up are left behind."""
        self.stopped.set()
        for thread in self.threads:
            if thread is not threading.current_thread():
                thread.join(timeout=2 * self.pace.beat)

    def heartbeat(self) -> Heartbeat:
        """What this rank does at this moment."""
        now = spans.state()
        return Heartbeat(
            rank=self.store.rank,
            beat=self.beat,
            wall=time.time(),
            step=SPANS.step,
            sequence=SPANS.sequence,
            state=now.state,
            what=now.what,
            group=now.group,
            among=members(now.among),
            phase=now.phase,
            before=SPANS.before,
            still_seconds=now.still_seconds,
            slow_seconds_ago=now.slow_seconds_ago,
            machine=self.machine,
            pid=os.getpid(),
        )

    def explain(self, error: BaseException) -> str | None:
        """One line for an error that a lost rank or a time-out caused, after looking who is to blame.

        It takes until silence is certain, less where the lost process ran on this machine. All other ranks
        are told. None for any other error.
        """
        lost = next((cause for cause in causes(error) if is_lost(cause)), None)
        if lost is None:
            return None
        with self.ending:
            if SPANS.failed is None or SPANS.failed[0] not in causes(error):
                SPANS.failed = (error, SPANS.failed[1] if SPANS.failed else wait_span(type(error).__name__))
            SPANS.top = None  # this thread is out of every crumb
            heartbeats, diagnosis = self._judge(lambda: not self.told.is_set())
            why = diagnosis or Diagnosis(UNKNOWN, (), "no rank is missing", "look at the network between them")
            message = f"{format_message(heartbeats.get(self.store.rank), why)} ({gist(lost)})"
            self._tell(message, heartbeats, why)
            return message

    def _give_signs(self) -> None:
        while not self.stopped.wait(self.pace.beat):
            self.beat += 1
            try:
                told = self.store.publish(self.heartbeat())
                self.store.remember()
            except (RuntimeError, OSError, ValueError):
                return  # the store is lost; that matters once somebody waits in vain, and each try logs a page
            if told is not None and not self.stopped.is_set():
                self.told.set()
                with self.ending:
                    self._end(told)

    def _look(self) -> None:
        pause = self.pace.beat / 4
        while not self.stopped.wait(pause):
            mark, pause = SPANS.changed, self.pace.beat / 4
            if time.monotonic() - mark > self.pace.look:
                with self.ending:
                    pause = self._judge_and_end(mark)

    def _judge_and_end(self, mark: float) -> float:
        """End the run if somebody has waited for too long, or is waited for by nobody but is missing.

        Returns after how many seconds to look again.
        """
        seldom = self.pace.timeout / 16  # long work is no fault: spare the store

        def still() -> bool:
            return SPANS.changed == mark and not self.stopped.is_set() and not self.told.is_set()

        heartbeats, diagnosis = self._judge(still)
        if diagnosis is None or not still():
            return self.pace.beat if diagnosis else seldom
        seen = reporter(self.store.rank, heartbeats, diagnosis)
        slow = min(heartbeats[rank].slow_seconds_ago for rank in diagnosis.ranks or heartbeats)
        waited = seen is not None and seen.state == WAITS and self._too_long(seen.still_seconds, slow, diagnosis)
        last = min((heartbeats[rank].wall for rank in diagnosis.ranks), default=time.time())
        lost = diagnosis.kind == DEAD or (diagnosis.kind == UNRESPONSIVE and time.time() - last > self.pace.look)
        if waited or lost:  # torch waits where no crumb is, too, and a rank that cannot answer for a moment is no loss
            message = format_message(seen or heartbeats[self.store.rank], diagnosis)
            self._end(message, lambda: self._tell(message, heartbeats, diagnosis))
        if diagnosis.kind == UNRESPONSIVE:
            return self.pace.beat
        return min(seldom, self.pace.look - slow) if 0 < slow < self.pace.look else seldom

    def _too_long(self, seconds: float, slow: float, diagnosis: Diagnosis) -> bool:
        """Whether a wait of ``seconds`` ends the run, where the rank to blame was in a slow phase ``slow`` seconds ago.

        One that answers has `SLOW_FACTOR`, and the usual time from its end; one that does not, the usual time from
        its last sign, since what is slow may keep it from answering for a moment.
        """
        if slow <= self.pace.look:
            return diagnosis.kind in (STRAGGLER, UNKNOWN) and seconds > self.pace.slow_look
        return seconds > self.pace.look

    def _judge(self, still: Callable[[], bool]) -> tuple[dict[int, Heartbeat], Diagnosis | None]:
        """Look at all signs, twice if no process is known to have ended, and decide."""
        me, wait = self.store.rank, self.pace.silence
        zero_is_gone = self.store.at_rank_0 and 0 in self._gone(self.store.known)
        first = None if zero_is_gone else self.store.read(wait)
        if first is None:
            return self._without_store()
        gone = self._gone(first)
        until = time.monotonic() + wait
        while not gone and still() and time.monotonic() < until:
            time.sleep(self.pace.beat / 10)
            gone = self._gone(first)
        second = self.store.read(wait)
        if second is None:
            return self._without_store()
        second[me] = self.heartbeat()
        silent = {rank for rank in first if rank != me and second[rank].beat == first[rank].beat}
        return second, diagnose(me, second, set() if gone else silent, gone, time.time())

    def _gone(self, heartbeats: dict[int, Heartbeat]) -> set[int]:
        return {
            rank
            for rank, heartbeat in heartbeats.items()
            if rank != self.store.rank and has_ended(heartbeat, self.machine)
        }

    def _without_store(self) -> tuple[dict[int, Heartbeat], Diagnosis]:
        """The store does not answer: whoever holds it is to blame, as far as the last signs say."""
        heartbeats = self.store.known | {self.store.rank: self.heartbeat()}
        gone = self._gone(heartbeats)
        silent = {0} if self.store.at_rank_0 and self.store.rank != 0 and not gone else set()
        diagnosis = diagnose(self.store.rank, heartbeats, silent, gone, time.time()) if silent | gone else None
        holder = "rank 0" if self.store.at_rank_0 else "the agent of the first host"
        lost = f"{holder}, which keeps the ranks' signs, does not answer"
        if diagnosis is None:
            return heartbeats, Diagnosis(UNRESPONSIVE, (), lost, "look whether its machine is alive")
        return heartbeats, Diagnosis(diagnosis.kind, diagnosis.ranks, f"{diagnosis.why}; {lost}", diagnosis.advice)

    def _tell(self, message: str, heartbeats: dict[int, Heartbeat], diagnosis: Diagnosis) -> None:
        """Tell the other ranks; end those on this machine that have stopped and cannot hear it."""
        silent = diagnosis.ranks if diagnosis.kind == UNRESPONSIVE else ()
        if not (self.store.at_rank_0 and 0 in diagnosis.ranks):  # who holds the store has stopped or is gone
            self.store.announce(message)
        if self.store.at_rank_0 and self.store.rank == 0:
            time.sleep(1.5 * self.pace.beat)  # the store ends with this process: let the others hear first
        for rank in silent:
            if rank in heartbeats and heartbeats[rank].machine == self.machine:
                with contextlib.suppress(OSError):
                    os.kill(heartbeats[rank].pid, signal.SIGKILL)  # an agent would wait half a minute for it

    def _end(self, message: str, tell: Callable[[], None] = lambda: None) -> None:
        """Say why and end this process."""
        if self.stopped.is_set():
            return
        try:
            self.on_hang(message)
            tell()
            if self.record is not None:
                dump_flight_record(self.record)
        finally:
            leave(CRASHED)


def members(among: Any) -> str:
    """What a crumb says of whom it is with, as a sign carries it."""
    if among is None:
        return ""
    return encode_ranks(dist.get_process_group_ranks(among) if isinstance(among, dist.ProcessGroup) else among)


def causes(error: BaseException) -> list[BaseException]:
    """An error and what it was raised from: torch's pipeline wraps what an exchange raised."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and cause not in found:
        found.append(cause)
    return found


def is_lost(error: BaseException) -> bool:
    """Whether an exchange failed for want of another rank."""
    text = str(error).lower()
    return isinstance(error, RuntimeError | OSError) and any(heartbeat in text for heartbeat in LOST)


def gist(error: BaseException) -> str:
    """The first sentence of an error of torch's, without the source file that it begins with."""
    return str(error).partition("\n")[0].rpartition("] ")[2].partition(". ")[0][:200]


def leave(code: int) -> NoReturn:
    """End this process at once: what is left of its process group may never come down in an orderly way."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


_present: Watchdog | None = None


def start(timeout_seconds: float, on_hang: Callable[[str], None], folder: Path) -> None:
    """Watch this rank from here to `stop`; nothing where there is one rank. All ranks call it after they have met.

    Args:
        timeout_seconds: how long one crumb may wait.
        on_hang: is given the line to say; called from a thread, and the process ends when it returns.
        folder: the run's, for NCCL's flight records.
    """
    global _present
    stop()
    SPANS.clear()
    if dist.get_world_size() == 1:
        return
    rank = dist.get_rank()
    record = flight_record_path(folder, rank) if torch.cuda.is_available() else None
    store = HeartbeatStore(default_store(), rank, dist.get_world_size())
    _present = Watchdog(store, timeout_seconds, on_hang, record)
    limit(timeout_seconds)
    _present.start()


def limit(timeout_seconds: float) -> None:
    """How long a crumb may wait from here on, and torch's own exchanges too: a mesh's groups come with half an hour."""
    _limit_groups(timeout_seconds * GROUP_FACTOR)
    if _present is not None:
        _present.pace = Pace.of(timeout_seconds, _present.store.world_size)


def _limit_groups(seconds: float) -> None:
    for group in process_groups():
        if group.group_desc != BESIDE:
            set_group_timeout(group, seconds)


def longest(timeout_seconds: float) -> float:
    """How long a group beside training may wait for a rank that writes a checkpoint."""
    return timeout_seconds * SLOW_FACTOR * GROUP_FACTOR


@contextlib.contextmanager
def slow_timeout() -> Iterator[None]:
    """Exchanges that begin in it wait for ranks in slow phases: the process groups do not give up before the watch."""
    if _present is not None:
        _limit_groups(longest(_present.pace.timeout))
    try:
        yield
    finally:
        if _present is not None:
            _limit_groups(_present.pace.timeout * GROUP_FACTOR)


def stop() -> None:
    """End the watch, if one is kept."""
    global _present
    if _present is not None:
        _present.stop()
    _present = None


def explain(error: BaseException) -> str | None:
    """`Watchdog.explain` of the watch that is kept; None without one."""
    return None if _present is None else _present.explain(error)
