"""A live first node keeps its claim: other runs, restarted and cut-off nodes; run folders that cannot be written."""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import launch.nodes.node
from launch.nodes.claims import Claim, ClaimError, Claims
from launch.nodes.link import Link, StoreLostError
from launch.nodes.meeting import Meeting, start_store
from launch.nodes.node import Node
from launch.nodes.rendezvous import RendezvousParameters
from launch.signals import Signals
from launch.supervisor.journal import Journal
from launch.supervisor.recall import read_starts
from longcat.errors import ConfigError
from tests.support.meetings import IDENTITY, begun
from tests.support.meetings import claims as claims
from tests.support.meetings import dead_pid as dead_pid
from tests.support.meetings import place as place
from tests.support.ports import free_ports
from train.compose import compose
from train.process.stop import SAVE_SIGNAL


def soon(seconds: float = 1.5) -> float:
    return time.monotonic() + seconds


def test_another_run_in_the_folder_is_refused(place: RendezvousParameters, claims: Claims) -> None:
    """Two Slurm jobs with one run folder: the second ends in one line, and the first never hears of it."""
    with closing(begun(place, claims)) as live:
        other = RendezvousParameters(2, "x", "127.0.0.1", free_ports(1)[0], 0)
        second = Meeting(other, {**IDENTITY, "Slurm job": "2"}, claims, 5.0, lambda: False)
        with pytest.raises(ConfigError, match=r"in use by another run.*Slurm job is none there and 2 here"):
            second.begin(soon(0.1))
        assert not second.is_first
        live.check()
        assert claims.highest() == live.number
        live.renewed = 0.0
        threading.Timer(0.5, live.check_sometimes).start()
        with pytest.raises(ConfigError, match="in use by another run"):
            second.begin(soon(60))  # sees it renew its lease
    second.begin(soon(60))
    assert second.is_first and second.number == 2, "the first run has given up its claim"
    with pytest.raises(ConfigError, match="in use by another run"):
        first = Meeting(place, IDENTITY, claims, 5.0, lambda: False)
        first.number, first.link = 1, second.link
        first.again(0, soon())
    second.close()


def test_cut_off_node_deposes_nobody(
    place: RendezvousParameters, claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for its way to the first node's store, which it takes again."""
    with closing(begun(place, claims)) as first, closing(begun(place, claims)) as cut_off:
        store = cut_off.link.store
        with monkeypatch.context() as broken:
            broken.setattr(Meeting, "_connect_to_claim", lambda *_: False)
            with pytest.raises(StoreLostError, match="no node has taken"):
                cut_off.again(0, soon())
        assert claims.highest() == first.number
        assert cut_off.is_others() and not first.is_others()
        assert cut_off.again(0, soon(30)) is None
        assert cut_off.link.store == store and not cut_off.is_first


def test_restarted_first_node_deposes_nobody(place: RendezvousParameters, claims: Claims, dead_pid: int) -> None:
    """With a live claim that it cannot reach; an old lease, or a process that has ended here, is one to follow."""
    assert claims.take(Claim(3, "b", "127.0.0.1", 1, IDENTITY))
    with pytest.raises(ConfigError, match="no first node"):
        Meeting(place, IDENTITY, claims, 5.0, lambda: False).begin(soon())
    assert claims.highest() == 3
    os.utime(claims.folder / "launch.store-3.json", (time.time() - 6,) * 2)
    with closing(begun(place, claims)) as meeting:
        assert meeting.is_first and meeting.number == 4
    assert claims.take(Claim(5, "b", "127.0.0.1", 1, IDENTITY, pid=dead_pid))
    with closing(begun(place, claims)) as meeting:
        assert meeting.number == 6


def test_first_node_by_takeover_replaces_its_store(place: RendezvousParameters, claims: Claims) -> None:
    """At its own address, not that of launch.rendezvous, whose machine may be lost."""
    node = Meeting(place, IDENTITY, claims, 5.0, lambda: False)
    assert node._serve("127.0.0.2", [place.port], 0)
    with closing(node):
        assert node.server is not None
        node.server.kill()
        assert node.again(0, soon(60)) is None
        assert node.is_first and node.link.host == "127.0.0.2"


def test_own_end_is_no_usurper(place: RendezvousParameters, claims: Claims) -> None:
    with closing(begun(place, claims)) as meeting:
        assert meeting.end(0)
        meeting.check()


def no_space(*_: object, **__: object) -> Any:
    raise OSError(28, "No space left on device")


def test_claim_without_space_leaves_nothing(claims: Claims, monkeypatch: pytest.MonkeyPatch) -> None:
    claims.folder.mkdir()
    with monkeypatch.context() as full:
        full.setattr(Path, "write_text", no_space)
        with pytest.raises(ClaimError, match=r"No space left on device.*make room"):
            claims.take(Claim(1, "a", "host", 1, IDENTITY))

    class FullFile:
        def __enter__(self) -> FullFile:
            return self

        def __exit__(self, *_: object) -> None: ...

        write = no_space

    with monkeypatch.context() as full:
        full.setattr(os, "link", no_space)
        opened = Path.open
        full.setattr(Path, "open", lambda path, mode="r", **more: (opened(path, mode, **more), FullFile())[mode == "x"])
        with pytest.raises(ClaimError):
            claims.take(Claim(1, "a", "host", 1, IDENTITY))
    assert os.listdir(claims.folder) == []


def test_check_outlives_a_file_system_error(
    place: RendezvousParameters, claims: Claims, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(begun(place, claims, 1.0)) as meeting, monkeypatch.context() as broken:
        broken.setattr(os, "listdir", no_space)
        meeting.check()
        threading.Timer(0.6, broken.undo).start()
        meeting.check_before_start()


@pytest.fixture
def node(tmp_path: Path, place: RendezvousParameters) -> Node:
    config = compose(["model=debug", "run.name=run", f"run.dir={tmp_path}", "launch.restarts=2"])
    return Node([], config, place, 1, Signals())


def test_an_end_that_cannot_be_claimed_is_published(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.nodes.node, "decide_end", lambda *_: 7)
    node.meeting.end = Mock(side_effect=ClaimError("no space"))  # type: ignore[method-assign]
    link = Mock()
    node.decide(link, ["a"])
    assert json.loads(link.request.call_args.kwargs["claim"]["job/end"]) == {"message": "", "code": 7}


def test_follower_notices_that_nobody_decides(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "look", dict)
    node.decider = threading.Thread(target=lambda: None)
    with pytest.raises(StoreLostError, match="deciding"):
        node.follow()


def test_losses_before_the_first_step_are_counted(node: Node) -> None:
    node.meeting = Mock(is_first=False)
    node.meeting.again.return_value = None
    for _ in range(3):
        node.meet_again(StoreLostError("lost"))
    with pytest.raises(StoreLostError):
        node.meet_again(StoreLostError("lost"))


def test_request_to_save_waits_for_the_next_store(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "look", dict)
    monkeypatch.setattr(node, "pass_to_others", Mock(side_effect=StoreLostError))
    node.signals._note(SAVE_SIGNAL, None)
    with pytest.raises(StoreLostError):
        node.follow()
    assert node.signals.take() == [SAVE_SIGNAL]


def test_ended_link_stays_closed(place: RendezvousParameters) -> None:
    """Another thread may be connecting anew when the connection is ended."""
    store = start_store(place.port, 60.0, IDENTITY)
    assert store is not None
    link = Link(place.host, place.port, IDENTITY, 5.0)
    connect = link._connect
    link._connect = lambda: (connect(), link.end())[0]  # type: ignore[func-returns-value, method-assign]
    with pytest.raises(StoreLostError, match="left"):
        link._reconnect(soon(30))
    assert link.socket.fileno() == -1
    store.kill()
    store.wait()


START = {"event": "start", "command": "x", "claim": 1, "incarnation": 1, "time": 100.0}
START |= {"before": 0, "newest": 0, "on": ["a"]}
END = {"event": "end", "cause": "crash", "code": 1, "message": "", "ranks": [], "nodes": [], "best": 3, "base": 0}
END |= {
    "command": "x",
    "kept": 0,
    "blocked_seconds": 0.0,
    "saves": 0,
    "finished": [],
    "claim": 1,
    "incarnation": 1,
    "time": 110.0,
}


@pytest.mark.parametrize(("written", "end", "steps"), [(90.0, 100.0, []), (104.0, 104.0, [(2, 103.0), (3, 104.0)])])
def test_unfinished_start(written: float, end: float, steps: list[tuple[int, float]], tmp_path: Path) -> None:
    """It has no negative time where metrics.jsonl is older than the start: the first node was lost before a step."""
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "step_seconds": 1.0}) + "\n" for step in (1, 2, 3)))
    os.utime(path, (written, written))
    found = read_starts([START | {"newest": 1}], "x", Mock(), path)
    (life,), (start,) = found.lives, found.own
    assert (life.begin, life.end, list(life.finished), start.ended) == (100.0, end, steps, end)


def test_starts_and_ends_are_paired_by_claim() -> None:
    """A replaced first node may have written between the lines of the one that came after it."""
    second, late = START | {"claim": 2, "incarnation": 2, "time": 120.0}, START | {"incarnation": 3, "time": 121.0}
    second_end = END | {"claim": 2, "incarnation": 2, "time": 130.0}
    lines = [START, END, second, late, END | {"incarnation": 3}, second_end]
    found = read_starts(lines, "x", Mock(), Path("none"))
    assert [(life.begin, life.end) for life in found.lives] == [(100.0, 110.0), (120.0, 130.0)]


def test_replaced_first_node_notes_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, print, Mock(side_effect=StoreLostError))
    with pytest.raises(StoreLostError):
        journal.record({"event": "start"})
    assert not (tmp_path / "launch.jsonl").exists()
