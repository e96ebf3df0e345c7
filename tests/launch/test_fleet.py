"""What the first node sees of the others, through a real store: members, spares, reports, requests; lost nodes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.fleet import Assignment, NodeReport
from launch.leader import Outcome, exit_code, run_incarnation
from launch.nodes.link import STOP, Link, StoreFleet, StoreLostError
from launch.nodes.meeting import start_store
from longcat.errors import BAD_INPUT, CRASHED, OK, STOPPED
from tests.support.ports import free_ports
from train.run_dir.exit_file import claim_exit

IDENTITY = {"run folder": "/run"}


@pytest.fixture
def links() -> Iterator[tuple[Link, Link]]:
    """The connections of two nodes that have joined."""
    port = free_ports(1)[0]
    store = start_store(port, 120, IDENTITY)
    assert store is not None
    nodes = Link("127.0.0.1", port, IDENTITY, 5), Link("127.0.0.1", port, IDENTITY, 5)
    for number, (link, name) in enumerate(zip(nodes, ("a", "b"), strict=True)):
        assert link.request(join={"token": name, "name": name, "wanted": number})["id"] == number
    yield nodes
    for link in nodes:
        link.close()
    store.kill()
    store.wait()


def report(node: str, codes: dict[int, int], ended: float = 1.0) -> NodeReport:
    failed = next((rank for rank, code in codes.items() if code), None)
    return NodeReport(node, 1, codes, failed, "", ended)


def test_first_node_sees_members_spares_and_reports(links: tuple[Link, Link]) -> None:
    ours, theirs = links
    fleet = StoreFleet(ours, 60.0)
    fleet.start(Assignment(1, ("b",), 1, ("x=1",)))
    assert [(node.name, node.id, node.spare) for node in fleet.nodes()] == [("a", 0, True), ("b", 1, False)]
    assert fleet.reports(1) == []
    theirs.set("1/report/1", report("b", {0: -9}).to_json())
    assert fleet.reports(1) == [report("b", {0: -9})]
    fleet.signal(15)
    fleet.stop_ranks(1, 2.5)
    assert sorted(theirs.read("1/control/").values()) == ["15", "2.5"]
    assert not fleet.stop_requested()
    theirs.set(STOP, "SIGTERM")
    assert fleet.stop_requested()
    assert StoreFleet(ours, 0.0).nodes() == [], "silent for longer than node_timeout"


def test_newcomers_of_one_name_are_told_apart(links: tuple[Link, Link]) -> None:
    ours, theirs = links
    assert theirs.request(join={"token": "again", "name": "a", "wanted": None})["id"] == 2
    assert theirs.request(join={"token": "again", "name": "a", "wanted": None})["id"] == 2, "asked twice"
    assert [node.name for node in StoreFleet(ours, 60.0).nodes()] == ["a", "b", "a/2"]


def test_incarnation_ends_without_a_lost_node(links: tuple[Link, Link]) -> None:
    """The others' ranks are told to end, and the lost node is named."""
    ours, theirs = links
    ours.request(leave=1)
    ours.set("1/report/0", report("a", {0: 1}).to_json())
    outcome = run_incarnation(StoreFleet(ours, 60.0), Assignment(1, ("a", "b"), 1, ()))
    assert (outcome.lost, outcome.codes) == (("b",), {0: 1})
    assert "node b" in outcome.message
    assert len(theirs.read("1/control/stop/")) == 1


def test_lost_store_is_noticed(links: tuple[Link, Link]) -> None:
    ours, _ = links
    ours.port = free_ports(1)[0]
    ours.close()
    with pytest.raises(StoreLostError):
        ours.read("job/")


@pytest.mark.parametrize(
    ("codes", "recorded", "code"),
    [
        ({0: 0, 1: 0}, None, OK),
        ({0: 1, 1: -9}, None, CRASHED),
        ({0: 3, 1: -9}, STOPPED, STOPPED),
        ({0: 2, 1: 1}, STOPPED, BAD_INPUT),
        ({0: 0, 1: -11}, OK, CRASHED),
    ],
)
def test_exit_code_is_the_recorded_one(codes: dict[int, int], recorded: int | None, code: int, tmp_path: Path) -> None:
    """Else that of the rank that failed first; 2 comes before ranks enter the folder, which may be another run's."""
    if recorded is not None:
        claim_exit(tmp_path, recorded, "")
    assert exit_code(Outcome((report("a", codes),), ()), tmp_path, None) == code
