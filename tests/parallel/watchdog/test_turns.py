"""Few ranks read all heartbeats: what the store gives out grows as the ranks do, and a lost reader is replaced."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch.distributed as dist

from parallel.watchdog import turns
from parallel.watchdog.diagnosis import HangCause, diagnose, diagnoses
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.heartbeats import Announcement, Heartbeat, HeartbeatStore
from parallel.watchdog.spans import SPANS, wait_span
from parallel.watchdog.turns import READERS, Turn
from parallel.watchdog.watchdog import Watchdog
from tests.parallel.watchdog.heartbeat_cases import WAITING, WORKING, heartbeats

CONFIRM = 2.5


class StandIn:
    """A store in which all ranks publish between two readings; counts the values that it gives out."""

    def __init__(self, published: dict[int, Heartbeat]) -> None:
        self.published = [json.loads(heartbeat.to_json()) for _, heartbeat in sorted(published.items())]
        self.others = dist.HashStore()
        self.requests = self.values = 0

    def clone(self) -> StandIn:
        return self

    def check(self, keys: list[str]) -> bool:
        self.requests += 1
        return all(self._rank(key) is not None or self.others.check([key]) for key in keys)

    def get(self, key: str) -> bytes:
        self.requests, self.values = self.requests + 1, self.values + 1
        return self._text(key)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.requests, self.values = self.requests + 1, self.values + len(keys)
        return [self._text(key) for key in keys]

    def add(self, key: str, number: int) -> int:
        self.requests += 1
        return self.others.add(key, number)

    def append(self, key: str, text: str) -> None:
        self.others.append(key, text)

    def compare_set(self, key: str, expected: str, wanted: str) -> bytes:
        self.requests += 1
        return self.others.compare_set(key, expected, wanted)

    def set(self, key: str, value: str) -> None:
        self.others.set(key, value)

    def _rank(self, key: str) -> int | None:
        name = key.rpartition("/")[2]
        return int(name) if key.count("/") == 2 and name.isdigit() else None

    def _text(self, key: str) -> bytes:
        rank = self._rank(key)
        if rank is None:
            return bytes(self.others.get(key))
        now = {"rank": rank, "count": self.requests, "timestamp": time.time()}
        return json.dumps(self.published[rank % len(self.published)] | now).encode()


def watchdogs(store: StandIn, world_size: int, said: list[str]) -> list[Watchdog]:
    """One of each rank, eight on a machine, whose threads do not run."""
    found = [Watchdog(HeartbeatStore(store, rank, world_size), 600.0, said.append) for rank in range(world_size)]  # type: ignore[arg-type]
    for rank, kept in enumerate(found):
        kept.timing = replace(kept.timing, heartbeat=0.01)
        kept.machine = f"machine{rank // 8}/1"
        kept.store.register(kept.machine)
    return found


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[float]:
    """This process, all ranks' stand-in, has made no progress for an hour; returns since when. Nobody sleeps."""
    monkeypatch.setattr(Watchdog, "_pause", lambda *arguments: None)
    SPANS.clear()
    SPANS.last_change = time.monotonic() - 3600
    yield SPANS.last_change
    SPANS.clear()


@pytest.mark.parametrize("world_size", [4, 512, 4096])
def test_what_waiting_ranks_read_grows_as_they_do(world_size: int, idle: float) -> None:
    """All are idle for long, which is no fault as long as none waits: they look, and look again."""
    store, said = StandIn(heartbeats(WORKING)), list[str]()
    ranks = watchdogs(store, world_size, said)
    for _ in range(3):
        for kept in ranks:
            kept._investigate(idle)
    assert not said
    readings_of_all = 2 * 2 * 2  # two ranks read twice, at once and when others have come to wait
    own_machine, list_of_machine, reader_seen = 8, 1, 3
    assert store.values <= world_size * (readings_of_all + own_machine + list_of_machine + reader_seen)
    assert store.requests <= world_size * 12 + 100


def test_few_ranks_diagnose_a_failed_collective(idle: float) -> None:
    ranks = watchdogs(StandIn(heartbeats(WORKING)), 64, [])
    looks = [kept._look(kept.failure_turn, 1.0, lambda: True) for kept in ranks]
    assert [look is not None for look in looks] == [True] * READERS + [False] * (64 - READERS)


def turn_of(rank: int, store: Any, count: int = 0) -> Turn:
    kept = HeartbeatStore(store, rank, 8)
    kept.publish(replace(WAITING, rank=rank, count=count))
    return Turn(kept, "wait")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time of turns, in its only element."""
    now = [100.0]
    monkeypatch.setattr(turns.time, "monotonic", lambda: now[0])
    return now


def test_a_reader_whose_heartbeats_stop_loses_its_turn(clock: list[float]) -> None:
    store = dist.HashStore()
    first, second, third = (turn_of(rank, store) for rank in (0, 2, 4))
    assert first.take(1.0, CONFIRM) and not second.take(1.0, CONFIRM) and not third.take(1.0, CONFIRM)
    for count in (1, 2, 3):
        clock[0] += 2
        turn_of(0, store, count)  # publishes
        assert not second.take(1.0, CONFIRM)
    assert not third.take(1.0, CONFIRM), "it has not looked for so long, but it has seen the heartbeat only now"
    clock[0] += CONFIRM + 1
    assert second.take(1.0, CONFIRM) and not third.take(1.0, CONFIRM)
    assert not first.take(1.0, CONFIRM), "it has been suspended, and goes on"


def test_a_turn_that_is_given_back_is_free(clock: list[float]) -> None:
    store = dist.HashStore()
    first, second = turn_of(0, store), turn_of(2, store)
    assert first.take(1.0, CONFIRM) and not second.take(1.0, CONFIRM)
    first.release()
    assert second.take(1.0, CONFIRM) and not first.take(2.0, CONFIRM)


def test_a_rank_that_comes_to_wait_has_its_reader_look(clock: list[float]) -> None:
    store = dist.HashStore()
    reader, other = turn_of(0, store), turn_of(2, store)
    assert reader.take(1.0, CONFIRM)
    reader.due = clock[0] + 600
    assert not reader.take(1.0, CONFIRM)
    for wait in (1.0, 2.0):
        other.take(wait, CONFIRM)
        other.take(wait, CONFIRM)
        assert reader.take(1.0, CONFIRM), "for every wait"
        assert not reader.take(1.0, CONFIRM), "once"
    clock[0] += 601
    assert reader.take(1.0, CONFIRM)


def test_turns_of_another_incarnation_are_others() -> None:
    store = dist.HashStore()
    assert turn_of(0, store).take(1.0, CONFIRM)
    assert Turn(HeartbeatStore(store, 2, 8, "later"), "wait").take(1.0, CONFIRM)


SLOW = replace(WORKING, slow_seconds_ago=0.0)


def two_chains() -> dict[int, Heartbeat]:
    """Ranks 0 and 1 wait for rank 2, which writes a checkpoint; ranks 3 and 4 for rank 5, which hangs."""
    pair, other = replace(WAITING, ranks="0-2:1"), replace(WAITING, ranks="3-5:1", idle_seconds=590.0)
    return heartbeats(pair, pair, SLOW, other, replace(other, idle_seconds=595.0), WORKING)


def test_a_reader_looks_from_every_long_wait() -> None:
    given = two_chains()
    found = [(rank, one.ranks) for rank, one in diagnoses(0, diagnose(0, given, set(), set(), 0.0), given, 500.0)]
    assert found == [(0, (2,)), (4, (5,))]
    own = diagnose(5, given, set(), set(), 0.0)
    assert next(rank for rank, _ in diagnoses(5, own, given, 500.0)) == 5


def test_a_reader_behind_slow_work_ends_the_run_for_others(idle: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own wait is allowed; the longest wait of the others is over, and that rank's view is announced."""
    said = list[str]()
    store = StandIn(two_chains())
    reader = watchdogs(store, 6, said)[0]
    own = replace(two_chains()[0], idle_seconds=700.0)
    monkeypatch.setattr(reader, "heartbeat", lambda: own)
    monkeypatch.setattr("parallel.watchdog.watchdog.exit_process", lambda code: reader.stopped.set())
    reader._investigate(idle)
    assert len(said) == 1 and said[0].startswith("rank 4 has waited 595 s") and "rank 5 (process" in said[0]
    announced = reader.store.publish(own)
    assert announced is not None and announced.finding["ranks"][0]["rank"] == 5


def test_the_ended_process_of_a_neighbour_needs_no_turn(idle: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank on its machine knows, and reads no rank of other machines."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    alive = replace(WAITING, machine="machine0/1", pid=os.getpid())
    store = StandIn({rank: replace(alive, pid=ended.pid) if rank == 3 else alive for rank in range(8)})
    ranks = watchdogs(store, 64, [])
    monkeypatch.setattr(HeartbeatStore, "read", lambda self, seconds: pytest.fail("reads all heartbeats"))
    for kept in (ranks[2], ranks[5], ranks[7]):
        look = kept._look(kept.failure_turn, 1.0, lambda: True)
        assert look is not None and look[1] is not None
        assert (look[1].cause, look[1].ranks) == (HangCause.DEAD, (3,))


def test_a_failed_collective_says_what_the_reader_announces(idle: float) -> None:
    store = StandIn(heartbeats(WORKING))
    ranks = watchdogs(store, 8, [])
    assert ranks[0]._look(ranks[0].failure_turn, 1.0, lambda: True) is not None  # and has still to announce
    finding = {"kind": "dead", "ranks": [{"rank": 7, "host": "host"}]}
    waiting = ranks[2]

    def hear() -> None:
        time.sleep(0.05)
        waiting.announcement = Announcement("rank 7 has died", finding)
        waiting.announced.set()

    thread = threading.Thread(target=hear)
    thread.start()
    assert waiting.explain(dist.DistNetworkError("Connection closed by peer")) == "rank 7 has died"
    assert waiting.finding == finding
    thread.join()


def test_a_rank_that_does_not_reach_the_store_says_so_itself(idle: float, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*arguments: Any) -> bytes:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    store = StandIn(heartbeats(WORKING))
    kept = watchdogs(store, 8, [])[2]
    monkeypatch.setattr(store, "compare_set", lost)
    look = kept._look(kept.failure_turn, 1.0, lambda: True)
    assert look is not None and look[1] is not None and look[1].cause == HangCause.STORE_LOST


def test_rank_0_with_the_store_lets_others_hear_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store ends with it."""
    slept = list[float]()
    monkeypatch.setattr(time, "sleep", slept.append)
    for rank in (0, 1):
        kept = Watchdog(HeartbeatStore(dist.HashStore(), rank, 2), 600.0, lambda message: None)
        kept.announcement = Announcement("rank 1 has stopped", {})
        assert kept._heard() == "rank 1 has stopped"
    assert slept == [1.5]


def test_lost_readers_are_replaced_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 0 and 1 have the turns and are gone; of the others one of each turn takes over, and all say the same."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr("parallel.watchdog.watchdog.exit_process", lambda code: None)
    SPANS.clear()
    store, said = dist.HashStore(), list[str]()

    def end(kept: Watchdog, message: str) -> None:
        said.append(message)
        kept.stopped.set()

    ranks = [Watchdog(HeartbeatStore(store, rank, 6), 4.0, said.append) for rank in range(6)]
    with wait_span(Event(SpanKind.EXPERT_DISPATCH, layer=3)):
        SPANS.last_change -= 3.0
        for rank, kept in enumerate(ranks):
            kept.machine = f"machine{rank}/1"
            kept.store.publish(kept.heartbeat())
            assert kept.wait_turn.take(SPANS.last_change, 60.0) == (rank < READERS)
        for kept in ranks[READERS:]:
            kept.on_hang = partial(end, kept)
            kept.start()
        until = time.monotonic() + 30
        while len(said) < 4 and time.monotonic() < until:
            time.sleep(0.01)
        for kept in ranks[READERS:]:
            kept.stop()
    SPANS.clear()
    assert len(said) >= 4 and said[0].startswith("rank ")
    assert all("machine0) has stopped answering" in text and "and so has rank 1" in text for text in said)
