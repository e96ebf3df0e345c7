"""Who is the first node: claims in the run folder, a first node that was replaced, stores left of killed runs."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

import launch.nodes.link
import launch.nodes.meeting
from launch.fleet import Assignment
from launch.nodes.claims import Claim, Claims
from launch.nodes.link import Link, StoreFleet, StoreLostError
from launch.nodes.meeting import describe_self, start_store
from launch.nodes.rendezvous import RendezvousParameters
from launch.nodes.store import PROTOCOL
from tests.support.meetings import IDENTITY, begun
from tests.support.meetings import claims as claims
from tests.support.meetings import dead_pid as dead_pid
from tests.support.meetings import place as place


def test_one_of_many_takes_a_number(claims: Claims) -> None:
    assert (claims.highest(), claims.newest()) == (0, None)
    for number in (1, 2, 3):
        with ThreadPoolExecutor(8) as pool:
            taken = list(pool.map(lambda node: claims.take(Claim(number, str(node), "host", 1, IDENTITY)), range(8)))  # noqa: B023
        assert sum(taken) == 1
        assert claims.newest() == Claim(number, str(taken.index(True)), "host", 1, IDENTITY)
    assert not claims.take(Claim(2, "late", "host", 1, IDENTITY))
    assert sorted(os.listdir(claims.folder)) == ["launch.store-2.json", "launch.store-3.json"]


def test_replaced_first_node_starts_nothing(place: RendezvousParameters, claims: Claims) -> None:
    """However late it is told: the claim is read before each start, and its end is not that of the run."""
    with closing(begun(place, claims)) as meeting:
        fleet = StoreFleet(meeting.link, 5.0, meeting.check_before_start)
        fleet.start(Assignment(1, ("a",), 1, ()))
        assert claims.take(Claim(meeting.number + 1, "b", "127.0.0.1", 1, IDENTITY))
        with pytest.raises(StoreLostError, match="another node"):
            fleet.start(Assignment(2, ("a",), 1, ()))
        assert meeting.link.read("job/incarnation") == {"job/incarnation": "1"}
        assert not meeting.end(0)


def test_nodes_meet_at_the_highest_claim(place: RendezvousParameters, claims: Claims) -> None:
    """Two that have lost the store: one starts another, and both are connected to it. The end is a claim, too."""
    first = begun(place, claims)
    other = begun(place, claims)
    assert first.is_first and not other.is_first
    assert first.server is not None
    first.server.kill()
    with ThreadPoolExecutor() as pool:
        codes = list(pool.map(lambda each: each[1].again(each[0], time.monotonic() + 120), enumerate([first, other])))
    assert codes == [None, None]
    assert first.is_first != other.is_first
    assert first.link.address == other.link.address
    winner, follower = (first, other) if first.is_first else (other, first)
    assert winner.number == 2
    follower.number = 2
    assert winner.end(7)
    winner.close()
    assert follower.again(0, time.monotonic() + 120) == 7
    follower.close()


@pytest.fixture
def left(place: RendezvousParameters, dead_pid: int) -> Iterator[Link]:
    """The store of a run whose first node was killed."""
    store = start_store(place.port, 120.0, IDENTITY)
    assert store is not None
    link = Link(place.host, place.port, IDENTITY, 5.0)
    link.request(join={"token": "x", "name": "a", "wanted": 0}, first=describe_self(0) | {"pid": dead_pid})
    yield link
    link.close()
    store.kill()
    store.wait()


def test_new_start_ends_a_store_that_is_left(
    place: RendezvousParameters, left: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.nodes.meeting, "ALIVE_SECONDS", -1.0)
    monkeypatch.setattr(launch.nodes.meeting, "DEPARTED_SECONDS", 0.5)
    with closing(begun(place, None)) as meeting:
        assert meeting.is_first
        assert meeting.link.request(about=True)["first"] is None
    with pytest.raises(StoreLostError):
        left.read("job/")


def test_store_that_greets_and_never_answers_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.nodes.link, "REQUEST_SECONDS", 0.1)
    greeting = json.dumps({"longcat": PROTOCOL, "identity": IDENTITY, "store": "x"}).encode() + b"\n"
    open_connections = []

    def greet() -> None:
        with server:
            for _ in range(20):  # then the port is closed
                connection, _ = server.accept()
                connection.sendall(greeting)
                open_connections.append(connection)

    server = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=greet, daemon=True).start()
    link = Link("127.0.0.1", server.getsockname()[1], IDENTITY, 0.3)
    with pytest.raises(StoreLostError, match="does not answer"):
        link.read("job/")
    link.close()
    for connection in open_connections:
        connection.close()


def test_new_store_at_an_old_address_is_noticed(place: RendezvousParameters) -> None:
    meeting = begun(place, None)
    link = Link(place.host, place.port, IDENTITY, 5.0)
    meeting.close()
    store = start_store(place.port, 120.0, IDENTITY)
    assert store is not None
    with pytest.raises(StoreLostError, match="another one"):
        link.read("job/")
    link.close()
    store.kill()
    store.wait()


def test_what_a_node_reads_does_not_grow(place: RendezvousParameters) -> None:
    """The answer to a heartbeat has the same size with 300 nodes as with ten."""
    sizes = []
    with closing(begun(place, None, 600.0)) as meeting:
        for count in (10, 300):
            for number in range(count):
                meeting.link.request(join={"token": str(number), "name": f"n{number}", "wanted": number})
            time.sleep(1.1)
            answer = meeting.link.request(beat=1, read=["job/", "1/control/"])
            assert answer["members"] == count
            sizes.append(len(str({**answer, "members": 0})))
    assert abs(sizes[0] - sizes[1]) < 8
