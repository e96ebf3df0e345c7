"""However many nodes there are, together they ask the store as often as it can answer; counted on a stand-in clock."""

from __future__ import annotations

import time
from typing import Any

import pytest

from launch.fleet import Assignment, NodeReport, NodeState
from launch.leader import run_incarnation
from launch.nodes.link import END
from launch.nodes.node import Node
from launch.nodes.rendezvous import RendezvousParameters
from launch.nodes.store import Membership, Values
from launch.pace import ENTRIES_PER_SECOND, HEARTBEATS, REQUESTS_PER_SECOND, leader_pause, node_pause
from launch.signals import Signals
from train.compose import compose

SECONDS, TIMEOUT = 100.0, 30.0  # watched; launch.node_timeout


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in its only element, which passes where something sleeps."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def test_pauses_of_small_jobs_are_the_shortest() -> None:
    assert [node_pause(0.5, nodes, TIMEOUT) for nodes in (1, 2, 100, 200)] == [0.5] * 4
    assert [node_pause(0.05, nodes, TIMEOUT) for nodes in (1, 20)] == [0.05] * 2
    assert [leader_pause(0.1, nodes) for nodes in (1, 200)] == [0.1] * 2
    assert node_pause(0.5, 2, 1.0) == 0.5, "launch.node_timeout may be short"


@pytest.mark.parametrize("nodes", [300, 1280, 10_000])
def test_no_node_falls_silent_because_there_are_many(nodes: int) -> None:
    assert 0.5 < node_pause(0.5, nodes, TIMEOUT) <= TIMEOUT / HEARTBEATS


class StandInLink:
    """A store that answers at once, for good or until the run ends."""

    def __init__(self, clock: list[float], nodes: int) -> None:
        self.clock, self.nodes, self.requests, self.address = clock, nodes, 0, "store"
        self.end = clock[0] + SECONDS

    def request(self, **request: Any) -> dict[str, Any]:
        self.requests += 1
        values = {END: '{"code": 0, "message": ""}'} if self.clock[0] > self.end else {}
        first = {"id": 0, "claim": 1, "name": "a", "command": "c"}
        return {"values": values, "first": first, "first_silent": 0.0, "members": self.nodes}


class StandInRanks:
    """Ranks that train until the end."""

    grace_seconds = float("inf")

    def __init__(self, link: StandInLink) -> None:
        self.link = link

    def poll(self) -> bool:
        return self.link.clock[0] > self.link.end


def node_of(nodes: int, clock: list[float], words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Node, Any]:
    """One of ``nodes`` nodes, not the first, and its stand-in connection."""
    config = compose([*words, f"launch.node_timeout={TIMEOUT}"])
    node, link = (
        Node([], config, RendezvousParameters(nodes, "b", "127.0.0.1", 1, None), 8, Signals()),
        StandInLink(clock, nodes),
    )
    monkeypatch.setattr(node.meeting, "link", link, raising=False)
    node.id = 1
    return node, link


@pytest.mark.parametrize("nodes", [2, 200, 1280])
def test_heartbeats_of_all_nodes_are_as_many_as_the_store_bears(
    nodes: int, clock: list[float], overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    node, link = node_of(nodes, clock, overrides, monkeypatch)
    node.wait(StandInRanks(link))  # type: ignore[arg-type]
    assert nodes * (link.requests - 1) <= REQUESTS_PER_SECOND * SECONDS
    assert nodes > 200 or link.requests >= SECONDS / 0.6, "few nodes react as fast as ever"


@pytest.mark.parametrize("nodes", [2, 200, 1280])
def test_nodes_that_wait_for_a_start_ask_no_more_often(
    nodes: int, clock: list[float], overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    node, link = node_of(nodes, clock, overrides, monkeypatch)
    assert node.follow() == 0
    assert nodes * (link.requests - 2) <= REQUESTS_PER_SECOND * SECONDS
    assert nodes > 2 or link.requests >= SECONDS / 0.06


class StandInFleet:
    """Nodes whose ranks train for `SECONDS`; counts how often all of them are asked for."""

    def __init__(self, clock: list[float], names: list[str]) -> None:
        self.clock, self.names, self.end, self.looks = clock, names, clock[0] + SECONDS, 0

    def start(self, assignment: Assignment) -> None: ...

    def reports(self, incarnation: int) -> list[NodeReport]:
        is_over = self.clock[0] > self.end
        return [NodeReport(name, incarnation, {}, None, "", 0.0) for name in self.names] if is_over else []

    def nodes(self) -> list[NodeState]:
        self.looks += 1
        return [NodeState(name, number, 0.0) for number, name in enumerate(self.names)]


@pytest.mark.parametrize("nodes", [2, 1280])
def test_the_first_node_asks_for_all_more_seldom(nodes: int, clock: list[float]) -> None:
    names = [str(number) for number in range(nodes)]
    fleet = StandInFleet(clock, names)
    run_incarnation(fleet, Assignment(1, tuple(names), 8, ()))  # type: ignore[arg-type]
    assert nodes * (fleet.looks - 1) <= ENTRIES_PER_SECOND * SECONDS
    assert nodes > 2 or fleet.looks >= SECONDS / 0.11


class Counting(list[str]):
    """A list that counts what is read of it."""

    reads = 0

    def __getitem__(self, place: Any) -> Any:
        Counting.reads += 1
        return super().__getitem__(place)


def test_a_read_looks_at_few_of_many_values() -> None:
    values = Values()
    for number in range(5000):
        values.set(f"agreed/{number}", "name")
        values.claim(f"1/report/{number}", "{}")
    for key, value in (("job/ranks", "1"), ("job/stop", "x"), ("job", "no folder"), ("jobs/1", "another")):
        values.set(key, value)
    values.claim("job/ranks", "2")
    values.keys = Counting(values.keys)
    assert values.read("job/") == {"job/ranks": "1", "job/stop": "x"} and values.read("none/") == {}
    assert Counting.reads < 100
    assert len(values.read("agreed/")) == 5000 and values.read("assignment") == {}


def test_a_node_started_again_is_told_from_one_that_asks_seldom(clock: list[float]) -> None:
    """Of few nodes one that has been silent for 6 s is gone; of 2,000, which ask every 5 s, it may live."""
    for nodes, name in ((3, "node1"), (2000, "node1/2001")):
        membership = Membership(TIMEOUT)
        for number in range(nodes):
            membership.answer({"join": {"token": str(number), "name": f"node{number}", "wanted": None}})
        clock[0] += 6
        found = membership.answer({"join": {"token": "again", "name": "node1", "wanted": None}})
        assert found["name"] == name
