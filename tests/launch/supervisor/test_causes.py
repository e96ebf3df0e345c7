"""The cause of a start's end, and the nodes to blame, from fields and exit codes."""

from __future__ import annotations

from typing import Any

import pytest

from launch.fleet import Assignment, NodeReport
from launch.supervisor.causes import Cause, find_fault
from parallel.sdc.finding import Finding, Site

NODES = Assignment(1, ("a", "b"), 2, ())


def reports(codes: dict[int, int], first: int | None) -> list[NodeReport]:
    """Of nodes a (ranks 0, 1) and b (ranks 2, 3); ranks that are not named end with 0."""
    found = []
    for number, name in enumerate(NODES.nodes):
        own = {rank: codes.get(rank, 0) for rank in (2 * number, 2 * number + 1)}
        failed = next((rank for rank in (first, *own) if rank is not None and own.get(rank)), None)
        found.append(NodeReport(name, 1, own, failed, "", 1.0 if failed == first else 2.0))
    return found


def corruption() -> Any:
    """What exit.json says of a corruption that may be rank 3's or rank 0's."""
    sites = [Site(rank, f"host-{rank}", "cpu") for rank in range(4)]
    return Finding("replicas", 7, "weights", (3, 0)).error(sites).details["finding"]


@pytest.mark.parametrize(
    ("codes", "first", "written", "code", "cause", "ranks", "nodes"),
    [
        ({}, None, {"code": 0}, 0, Cause.done, (), ()),
        ({}, None, None, 0, Cause.done, (), ()),
        ({0: 2, 3: 2}, 0, {"code": 1}, 2, Cause.configuration, (), ()),
        ({0: 3, 1: 3, 2: 3, 3: 3}, 0, {"code": 3}, 3, Cause.stop, (), ()),
        ({1: 4, 2: 4}, 1, {"code": 4}, 4, Cause.unhealthy, (), ()),
        ({1: 5}, 1, {"code": 5, "finding": corruption()}, 5, Cause.corruption, (3,), ("b",)),
        ({1: 5}, 1, {"code": 5, "finding": {}}, 5, Cause.corruption, (), ()),
        ({0: 1, 2: -9}, 2, None, 1, Cause.crash, (2,), ("b",)),
        ({0: -6, 2: -9}, 0, None, 1, Cause.crash, (0,), ("a",)),
        ({0: 1, 2: -9}, 0, {"code": 1, "hang": {"kind": "dead", "ranks": [{"rank": 2}]}}, 1, Cause.crash, (2,), ("b",)),
        ({0: 1}, 0, {"code": 1, "hang": {"kind": "unresponsive", "ranks": [{"rank": 2}]}}, 1, Cause.hang, (2,), ("b",)),
        ({0: 1}, 0, {"code": 1, "hang": {"kind": "unknown", "ranks": []}}, 1, Cause.hang, (), ()),
        ({0: 1}, 0, {"code": 1, "cause": "out_of_memory"}, 1, Cause.out_of_memory, (), ()),
        ({0: 1}, 0, {"code": 1, "cause": "disk_full"}, 1, Cause.disk_full, (), ()),
        ({0: 1}, 0, {"code": 1, "cause": "store_lost"}, 1, Cause.store_lost, (), ()),
        ({0: 1}, 0, {"code": 1, "cause": "another"}, 1, Cause.crash, (0,), ("a",)),
        ({0: 3, 3: 3}, 0, {"code": 3, "straggler": {"ranks": [{"rank": 3}]}}, 3, Cause.straggler, (3,), ("b",)),
        ({0: -11}, 0, {"code": 0}, 1, Cause.crash, (0,), ("a",)),
    ],
)
def test_causes_come_from_fields(
    codes: dict[int, int],
    first: int | None,
    written: dict[str, Any] | None,
    code: int,
    cause: Cause,
    ranks: tuple[int, ...],
    nodes: tuple[str, ...],
) -> None:
    found = find_fault(NODES, reports(codes, first), (), written)
    assert (found.code, found.cause, found.ranks, found.nodes) == (code, cause, ranks, nodes)
    assert found.message


def test_a_lost_node_is_to_blame_for_what_its_loss_did() -> None:
    """The other node's ranks see a dead peer; a node lost after the end changes nothing."""
    rest = reports({0: 1}, 0)[:1]
    found = find_fault(NODES, rest, ["b"], {"code": 1, "hang": {"kind": "dead", "ranks": [{"rank": 3}]}})
    assert (found.code, found.cause, found.nodes) == (1, Cause.node_lost, ("b",))
    assert find_fault(NODES, [], ["a", "b"]).cause == Cause.node_lost
    assert find_fault(NODES, rest, ["b"], {"code": 1, "cause": "store_lost"}).cause == Cause.node_lost
    assert find_fault(NODES, reports({}, None)[:1], ["b"], {"code": 0}).cause == Cause.done


def test_a_lost_store_blames_no_node() -> None:
    found = find_fault(NODES, [], (), None, "connection refused")
    assert (found.code, found.cause, found.nodes) == (1, Cause.store_lost, ())


def test_one_machine_is_to_blame_without_a_name() -> None:
    machine = Assignment(1, ("here",), 2, ())
    report = NodeReport("here", 1, {0: 5, 1: 5}, 0, "", 0.0)
    assert find_fault(machine, [report], (), {"code": 5, "finding": {}}).nodes == ("here",)
