"""Runs over several node runners go on unattended through faults of many kinds, to the undisturbed state."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.supervisor.ledger import PARTS, describe
from tests.support.running import NARROW, exact, exit_json, finish, program, train_two
from tests.support.soak import CAUSES, PATIENCE, Cluster, Soak, draw, small_disk
from tests.support.soak_table import write
from train.checkpoint.manifest import list_checkpoints

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="finds ranks in /proc")

RUN = [*NARROW, "parallel.fsdp=2", "checkpoint.every=5"]
SUPERVISED = [
    "run.num_processes=1",
    "launch.nodes=2",
    "launch.join_seconds=600",
    "launch.restarts=8",
    "launch.backoff_seconds=0.5",
    "launch.on_unhealthy=retry",
    "launch.strike_hours=0.1",
]
SLOW_RANKS = ["launch.on_straggler=restart", "launch.straggler_steps=5"]  # only where one is planted: load makes others
SEED = 14


@contextmanager
def cluster(words: list[str], tmp_path: Path, node_timeout: int) -> Iterator[tuple[Cluster, bool]]:
    """Nodes a and b train in a small file system."""
    with small_disk(tmp_path / "disk", 24) as is_small:
        own = [word for word in words if not word.startswith("run.dir")]
        waits = [f"launch.node_timeout={node_timeout}", "parallel.timeout_seconds=10", f"run.dir={tmp_path / 'disk'}"]
        with Cluster([*own, *SUPERVISED, *waits], tmp_path / "disk" / "run", tmp_path / "nodes") as nodes:
            for name in "ab":
                nodes.start(name)
            yield nodes, is_small


def check_end(nodes: Cluster, soak: Soak, undisturbed: Path) -> None:
    """Everybody ended well, with the state of the undisturbed run, and each fault was told from the others."""
    assert set(nodes.finish().values()) == {0}, nodes.log()
    assert exit_json(nodes.folder)["code"] == 0 and not (nodes.folder / "gave_up.txt").exists()
    for one in soak.planted:
        assert one.cause in CAUSES[one.kind] | ({"crash", "hang"} if one.early else set()), one
    totals = nodes.journal()[-1]
    print(*describe(totals), sep="\n")
    assert sum(totals[name] for name in PARTS) == pytest.approx(totals["wall_seconds"])
    assert totals["faults"] >= len([one for one in soak.planted if one.cause != "straggler"])
    assert exact(nodes.folder) == exact(undisturbed)
    barred = {name: one.ended for one in soak.planted if one.cause == "corruption" for name in one.nodes}
    for line in nodes.journal():
        if line["event"] == "start":
            assert not [name for name in line["on"] if line["time"] > barred.get(name, float("inf"))]


def test_four_faults_change_no_bit(overrides: list[str], tmp_path: Path) -> None:
    """A killed rank beside a damaged checkpoint, NaN, a flipped bit whose node is barred, and a rank killed early."""
    words = [*overrides, *RUN, "train.steps=60"]
    with cluster(words, tmp_path, 60) as (nodes, _):
        nodes.start("c")
        soak = Soak(nodes, SEED)
        for kind in ("corrupt checkpoint", "NaN", "bit flip", "kill -9"):
            soak.plant(kind)
        assert train_two([*words, "run.name=undisturbed"]) == [0]
        check_end(nodes, soak, tmp_path / "undisturbed")
        assert {len(line["on"]) for line in nodes.journal() if line["event"] == "start"} == {2}


@pytest.mark.long
def test_a_soak_of_thirty_faults_changes_no_bit(overrides: list[str], tmp_path: Path) -> None:
    """Of all kinds, at random moments; a node that fails every time is among the spares."""
    words = [*overrides, *RUN, "train.steps=450"]
    with cluster([*words, *SLOW_RANKS], tmp_path, 30) as (nodes, is_small):
        soak = Soak(nodes, SEED)
        kinds = [kind for kind in CAUSES if is_small or kind != "disk full"]
        planned = draw(random.Random(SEED), 30, 3, kinds)
        nodes.wait("a step", lambda: nodes.step() > 0)
        nodes.start("bad", PLANTED_CRASH="1")
        for name in "cdefghijklm":
            nodes.start(name)
        nodes.wait_for_members()
        planned.insert(0, planned.pop(planned.index("kill -9")))  # the first start knew of no spare for a slow rank
        for kind in planned:
            print(soak.plant(kind), flush=True)
        assert set(nodes.finish().values()) == {0}, nodes.log()
        undisturbed = [*words, "run.num_processes=2", "run.name=undisturbed"]
        assert finish(program("launch", "train", *undisturbed), PATIENCE)[0] == 0
        check_end(nodes, soak, tmp_path / "undisturbed")
        ends = [line for line in nodes.journal() if line["event"] == "end"]
        failed = [line["incarnation"] for line in ends if "bad" in line["nodes"]]
        assert 3 <= len(failed) <= 6, failed  # excluded after three; then only if all others are
        assert list_checkpoints(nodes.folder / "checkpoints")
        write(soak.planted, nodes.journal(), nodes.folder)


@pytest.mark.long
def test_a_lost_node_shrinks_the_run_and_a_new_one_grows_it(overrides: list[str], tmp_path: Path) -> None:
    """With train.elastic_bits the bits are those of the undisturbed run at every size."""
    words = [*overrides, *RUN, "train.steps=60", "train.elastic_bits=2"]
    with cluster([*words, "launch.shrink=true"], tmp_path, 30) as (nodes, _):
        nodes.wait("steps", lambda: nodes.step() > 6)
        nodes.lose(next(name for name in nodes.nodes if name != nodes.first))
        sizes = Soak(nodes, SEED).sizes
        nodes.wait("a start on one node", lambda: sizes() == [2, 1])
        known = nodes.rows()
        nodes.wait("its steps", lambda: len(nodes.rows() - known) > 7)
        nodes.start("c")
        nodes.wait_for_members()
        os.kill(nodes.ranks()[0][0], signal.SIGKILL)
        assert set(nodes.finish().values()) == {0}, nodes.log()
        assert sizes() == [2, 1, 2]
        causes = [(line["cause"], len(line["nodes"])) for line in nodes.journal() if line["event"] == "end"]
        assert causes == [("node_lost", 1), ("crash", 1), ("done", 0)]
        assert train_two([*words, "run.name=undisturbed"]) == [0]
        assert exact(nodes.folder) == exact(tmp_path / "undisturbed")


@pytest.mark.long
def test_numbers_that_come_again_go_back_a_checkpoint(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN in step 12, from step 0 and again from checkpoint 10; from checkpoint 5 the run gets past it."""
    words = [*overrides, *RUN, "train.steps=30"]
    monkeypatch.setenv("PLANTED_NAN", "12,5")
    with cluster([*words, "checkpoint.keep=9"], tmp_path, 60) as (nodes, _):
        assert set(nodes.finish().values()) == {0}, nodes.log()
        causes = [line["cause"] for line in nodes.journal() if line["event"] == "end"]
        assert causes == ["unhealthy", "unhealthy", "done"]
        kept = {path.name for path in (nodes.folder / "checkpoints").iterdir()}
        assert "step-00000010.abandoned" in kept and "step-00000010" in kept
        assert train_two([*words, "run.name=undisturbed"]) == [0]
        assert exact(nodes.folder) == exact(tmp_path / "undisturbed")
