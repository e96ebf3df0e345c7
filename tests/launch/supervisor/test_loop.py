"""The loop over a fleet of several nodes, which are fakes: whom it assigns, what it writes, how it ends."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.fleet import GRACE_SECONDS, SAVE_SECONDS, Assignment
from launch.supervisor.ledger import PARTS
from launch.supervisor.loop import Supervisor, supervise
from launch.supervisor.progress import RunProgress
from longcat.errors import FolderInUseError
from tests.launch.supervisor.fake_fleet import Ending, FakeFleet
from train.checkpoint.manifest import CheckpointStatus
from train.compose import compose
from train.run_dir.folder import lock

Run = Callable[..., tuple[int, FakeFleet, list[dict[str, Any]]]]
WORDS = ("model=debug", "run.name=run", "launch.backoff_seconds=0")
CRASH_B = Ending(2, {1: -9})  # of node b's only rank


@pytest.fixture
def run(tmp_path: Path) -> Run:
    def supervised(
        endings: list[Ending], *words: str, names: str = "abc", nodes: int = 2
    ) -> tuple[int, FakeFleet, list[dict[str, Any]]]:
        base = ["launch.restarts=3", "launch.backoff_seconds=0", "train.global_batch_size=8", f"run.dir={tmp_path}"]
        config = compose(["model=debug", "run.name=run", *base, *words])
        rest: Iterator[Ending] = iter(endings)
        fleet = FakeFleet(names, tmp_path / "run", lambda _: next(rest))
        code = supervise(config, ["own=1"], 1, fleet, nodes)
        return code, fleet, [json.loads(line) for line in (tmp_path / "run" / "launch.jsonl").read_text().splitlines()]

    return supervised


def nodes_of(fleet: FakeFleet) -> list[str]:
    return ["".join(assignment.nodes) for assignment in fleet.started]


def test_a_node_that_fails_every_time_is_replaced(run: Run) -> None:
    code, fleet, journal = run([CRASH_B, CRASH_B, CRASH_B, Ending(9)])
    assert code == 0 and nodes_of(fleet) == ["ab", "ab", "ab", "ac"]
    ends = [line for line in journal if line["event"] == "end"]
    assert [(line["cause"], line["nodes"]) for line in ends] == [("crash", ["b"])] * 3 + [("done", [])]
    assert [line["on"] for line in journal if line["event"] == "start"][-1] == ["a", "c"]
    totals = journal[-1]
    assert sum(totals[name] for name in PARTS) == pytest.approx(totals["wall_seconds"])


def test_no_start_reads_the_end_of_the_last_one(tmp_path: Path) -> None:
    """Rank 0 removes exit.json when it begins; it may be lost before."""

    class LosesRank0(FakeFleet):
        def start(self, assignment: Assignment) -> None:
            assert not (self.folder / "exit.json").exists()
            super().start(assignment)

    endings = iter([Ending(3, {0: 4}, (4, {})), Ending(3, {1: -9}), Ending(9)])
    words = ["launch.restarts=2", "launch.on_unhealthy=retry", "train.global_batch_size=8", f"run.dir={tmp_path}"]
    fleet = LosesRank0("ab", tmp_path / "run", lambda _: next(endings))
    assert supervise(compose([*WORDS, *words]), [], 1, fleet, 2) == 0


def test_strikes_outlast_a_command(run: Run) -> None:
    run([CRASH_B, CRASH_B, Ending(1, {0: 3, 1: 3}, (3, {}))])
    code, fleet, _ = run([CRASH_B, Ending(9)])
    assert code == 0 and nodes_of(fleet) == ["ab", "ac"]


def test_a_node_that_computes_wrongly_is_barred_at_once(run: Run) -> None:
    finding = Ending(1, {0: 5, 1: 5}, (5, {"finding": {"rank": 0}}))
    code, fleet, _ = run([finding, Ending(9)])
    assert code == 0 and nodes_of(fleet) == ["ab", "bc"]


def test_a_lost_node_shrinks_the_run_until_it_is_back(run: Run) -> None:
    endings = [Ending(3, lost=("b", "c")), Ending(3, {0: -9}, back=("b",)), Ending(9)]
    code, fleet, _ = run(endings, "launch.shrink=true", "parallel.dp=2", "parallel.fsdp=1")
    assert code == 0 and nodes_of(fleet) == ["ab", "a", "ab"]
    words = [assignment.overrides for assignment in fleet.started]
    assert words == [("own=1",), ("own=1", "parallel.dp=1", "parallel.fsdp=1", "parallel.ep=1"), ("own=1",)]
    assert fleet.stopped == [1]


def test_too_few_nodes_end_with_a_page(run: Run, tmp_path: Path) -> None:
    code, fleet, _ = run([Ending(3, lost=("b",))], names="ab")
    page = (tmp_path / "run" / "gave_up.txt").read_text()
    assert code == 1 and nodes_of(fleet) == ["ab"]
    assert "Lost node: no heartbeat from b" in page and "1 of the 2 nodes that the run needs" in page
    assert "  b: 1 fault\n" in page and "on every node:\n     longcat train own=1\n" in page


def test_a_lost_store_ends_the_decisions(run: Run, tmp_path: Path) -> None:
    """The node runner that called ends the run; the journal has the cause."""
    with pytest.raises(ConnectionError):
        run([Ending(2, store_error="connection refused\nat …")])
    journal = [json.loads(line) for line in (tmp_path / "run" / "launch.jsonl").read_text().splitlines()]
    assert journal[-1]["cause"] == "store_lost" and "(connection refused)" in journal[-1]["message"]


def test_a_node_lost_while_others_save_shortens_their_time(tmp_path: Path) -> None:
    class LosesB(FakeFleet):
        def stop_ranks(self, incarnation: int, grace_seconds: float) -> None:
            graces.append(grace_seconds)
            if len(graces) == 1:
                self.silent.add("b")
                self.waiting = [one for one in self.waiting if one.node != "b"]
            else:
                super().stop_ranks(incarnation, grace_seconds)

    graces: list[float] = []
    fleet = LosesB("abc", tmp_path / "run", lambda _: Ending(2, {0: 3}))
    supervisor = Supervisor(compose([*WORDS, f"run.dir={tmp_path}"]), [], 1, fleet, 3, RunProgress(tmp_path / "none"))
    reports, lost = supervisor.watch(Assignment(1, ("a", "b", "c"), 1, ()))
    assert (graces, lost) == ([SAVE_SECONDS, GRACE_SECONDS], ["b"]) and {one.node for one in reports} >= {"a", "c"}


def test_numbers_that_come_again_start_from_an_older_one(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launch.supervisor.journal.verify", lambda path: CheckpointStatus(path, 0, None))
    unhealthy = (4, dict[str, Any]())
    endings = [
        Ending(10, {0: -9}, saved=True),
        Ending(10, {0: 4}, unhealthy, saved=True),
        Ending(0, {0: 4}, unhealthy),
        Ending(15),
    ]
    code, fleet, _ = run(endings, "launch.on_unhealthy=retry")
    found = ["".join(one.overrides[1:]) for one in fleet.started]
    older = tmp_path / "run" / "checkpoints" / "step-00000010"
    assert (code, found) == (0, ["", "", "", f"checkpoint.resume='{older}'"])


def test_a_straggler_gives_its_place_to_a_spare(run: Run) -> None:
    slow = Ending(5, {0: 3, 1: 3}, (3, {"straggler": {"ranks": [{"rank": 0, "host": "a"}], "steps": 20}}))
    code, fleet, journal = run([slow, Ending(9)], "launch.on_straggler=restart")
    assert code == 0 and nodes_of(fleet) == ["ab", "bc"]
    assert [line["cause"] for line in journal if line["event"] == "end"] == ["straggler", "done"]
    assert [one.overrides[1:] for one in fleet.started] == [(), ("launch.on_straggler=report",)]  # a is no spare


@pytest.mark.parametrize("own", [True, False], ids=["own", "never"])
def test_checkpoint_resume_holds_once(own: bool, run: Run, tmp_path: Path) -> None:
    """A start that dies before its first step has not followed it yet."""
    path = tmp_path / "run" / "checkpoints" / "step-00000003"
    path.mkdir(parents=True)
    value = str(path) if own else "never"
    _, fleet, _ = run([Ending(0, {0: -9}), Ending(4, {0: -9}), Ending(5)], f"checkpoint.resume={value}")
    assert [one.overrides[1:] for one in fleet.started] == [(), (), ("checkpoint.resume=auto",)]


def test_starts_share_the_time_limit(run: Run) -> None:
    _, fleet, _ = run([Ending(4, {0: -9}), Ending(5)], "train.stop_after_seconds=900")
    first, second = (one.overrides[1:] for one in fleet.started)
    assert first == () and 800 < float(second[0].removeprefix("train.stop_after_seconds=")) <= 900


def test_a_folder_in_use_is_left_alone(run: Run, tmp_path: Path) -> None:
    """Before the first start nothing is written; an old rank that holds it later is waited for, not given up on."""
    folder = tmp_path / "run"
    folder.mkdir()
    with lock(folder), pytest.raises(FolderInUseError):
        run([Ending(5)])
    assert [path.name for path in folder.iterdir()] == [".lock"]
    held = []

    def hold(_: Assignment) -> Ending:
        if not held:
            held.append(lock(folder))
            return Ending(0, {0: 2})
        held[0].close()
        return Ending(5)

    config = compose(
        ["model=debug", "run.name=run", f"run.dir={tmp_path}", "launch.restarts=3", "launch.backoff_seconds=0"]
    )
    assert supervise(config, [], 1, FakeFleet("a", folder, hold)) == 0


def test_another_training_in_the_folder_keeps_its_files(tmp_path: Path) -> None:
    folder, held = tmp_path / "run", []

    def hold(_: Assignment) -> Ending:
        held.append(lock(folder)) if not held else None
        return Ending(0, {0: 2})

    config = compose(
        ["model=debug", "run.name=run", f"run.dir={tmp_path}", "launch.restarts=1", "launch.backoff_seconds=0"]
    )
    assert supervise(config, [], 1, FakeFleet("a", folder, hold)) == 1
    held[0].close()
    assert not (folder / "exit.json").exists() and not (folder / "gave_up.txt").exists()


class KilledError(BaseException):
    """SIGKILL of the supervisor."""


def killed(_: Assignment) -> Ending:
    raise KilledError


def test_ledger_goes_on_after_a_killed_supervisor(tmp_path: Path) -> None:
    """It adds up to the wall clock since the first start of the command that was killed."""
    config = compose([*WORDS, f"run.dir={tmp_path}", "launch.restarts=1", "checkpoint.resume=never"])
    folder, words = tmp_path / "run", []
    for _ in range(3):
        fleet = FakeFleet("a", folder, killed)
        with pytest.raises(KilledError):
            supervise(config, [], 1, fleet)
        words.append(fleet.started[-1].overrides)
    assert supervise(config, [], 1, FakeFleet("a", folder, lambda _: Ending(5))) == 0
    journal = [json.loads(line) for line in (folder / "launch.jsonl").read_text().splitlines()]
    starts, totals = [line for line in journal if line["event"] == "start"], journal[-1]
    causes = [line["cause"] for line in journal if line["event"] == "end"]
    assert causes == ["supervisor_lost"] * 3 + ["done"] and [line["incarnation"] for line in starts] == [1, 2, 3, 4]
    assert (totals["starts"], totals["faults"]) == (4, 3)
    assert totals["wall_seconds"] == pytest.approx(totals["time"] - starts[0]["time"], abs=1e-3)
    assert sum(totals[name] for name in PARTS) == pytest.approx(totals["wall_seconds"])
    assert words == [()] * 3, "each command follows its own checkpoint.resume"
    assert supervise(config, [], 1, FakeFleet("a", folder, lambda _: Ending(5))) == 0
    assert json.loads((folder / "launch.jsonl").read_text().splitlines()[-1])["starts"] == 1, "the run had ended"


def test_tries_outlive_the_supervisor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after numbers that were not finite came again, it goes on with the checkpoint before the last."""
    monkeypatch.setattr("launch.supervisor.journal.verify", lambda path: CheckpointStatus(path, 0, None))
    base = ["launch.restarts=5", "launch.on_unhealthy=retry", f"run.dir={tmp_path}"]
    config, unhealthy = compose([*WORDS, *base]), (4, dict[str, Any]())
    before = iter([Ending(10, {0: -9}, saved=True), Ending(10, {0: 4}, unhealthy, saved=True)])
    with pytest.raises(StopIteration):
        supervise(config, [], 1, FakeFleet("a", tmp_path / "run", lambda _: next(before)))
    found = iter([Ending(0, {0: 4}, unhealthy), Ending(15)])
    fleet = FakeFleet("a", tmp_path / "run", lambda _: next(found))
    fleet.step = 20
    assert supervise(config, [], 1, fleet) == 0
    older = tmp_path / "run" / "checkpoints" / "step-00000010"
    assert [one.overrides for one in fleet.started] == [(), (f"checkpoint.resume='{older}'",)]


def test_full_disk_is_told_from_a_crash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that dies beside a disk without space for exit.json; no node is blamed, and the next start waits."""

    def no_space(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_bytes", no_space)
    endings = iter([Ending(5, {0: -9}), Ending(5, {0: 1}, (1, {"cause": "disk_full"})), Ending(5)])
    words = ["launch.restarts=2", "launch.backoff_seconds=0.01", f"run.dir={tmp_path}"]
    fleet = FakeFleet("a", tmp_path / "run", lambda _: next(endings))
    assert supervise(compose([*WORDS, *words]), [], 1, fleet) == 0
    journal = [json.loads(line) for line in (tmp_path / "run" / "launch.jsonl").read_text().splitlines()]
    ends = [line for line in journal if line["event"] == "end"]
    assert [(line["cause"], line["nodes"]) for line in ends] == [("disk_full", [])] * 2 + [("done", [])]
    assert "no space is left" in ends[0]["message"] and journal[-1]["waiting"] >= 0.02


def test_a_stop_between_starts_ends_with_3(tmp_path: Path) -> None:
    config = compose([*WORDS, f"run.dir={tmp_path}", "launch.restarts=3"])

    def script(assignment: Assignment) -> Ending:
        fleet.is_stopped = True
        return Ending(0, {0: -15})

    fleet = FakeFleet("a", tmp_path / "run", script)
    assert supervise(config, [], 1, fleet) == 3
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 3
    assert len(fleet.started) == 1
