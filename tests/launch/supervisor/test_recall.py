"""Commands in the folder of a run that has not ended: the ledger goes on, each command decides by its own starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from launch.supervisor.causes import Cause, Fault
from launch.supervisor.decide import Again, Policy, decide, unhealthy_tries
from launch.supervisor.ledger import PARTS
from launch.supervisor.loop import supervise
from launch.supervisor.node_choice import Start
from launch.supervisor.recall import Earlier, Leader
from tests.launch.supervisor.fake_fleet import Ending, FakeFleet
from train.compose import compose
from train.run_dir.sealed import seal_line, unseal_line

DAY = 86400.0
CRASH = Ending(0, {0: -9})
KILLED = None  # in place of an ending: SIGKILL of the supervisor


class KilledError(BaseException):
    """SIGKILL of the supervisor."""


def command(
    folder: Path, endings: Sequence[Ending | None], *words: str, leader: Leader | None = None
) -> tuple[int | None, FakeFleet]:
    """`longcat train` whose starts end so → its exit code, None if it was killed, and its fleet."""
    rest = iter(endings)

    def script(_: object) -> Ending:
        ending = next(rest)
        if ending is KILLED:
            raise KilledError
        return ending

    base = ["model=debug", "run.name=run", f"run.dir={folder.parent}", "launch.restarts=2", "launch.backoff_seconds=0"]
    fleet = FakeFleet("a", folder, script)
    try:
        return supervise(compose([*base, *words]), [], 1, fleet, leader=leader), fleet
    except KilledError:
        return None, fleet


def journal(folder: Path) -> list[dict[str, Any]]:
    return [unseal_line(line) for line in (folder / "launch.jsonl").read_text().splitlines()]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
    """Change each line of launch.jsonl, or leave it out."""
    lines = [line for line in map(change, journal(folder)) if line is not None]
    (folder / "launch.jsonl").write_text("".join(seal_line(line) + "\n" for line in lines))


def causes(folder: Path) -> list[str]:
    return [line["cause"] for line in journal(folder) if line["event"] == "end"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("endings", "code"),
    [
        ([Ending(1, {0: 4}, (4, {}))], 4),
        ([Ending(1, {0: 3}, (3, {}))], 3),
        ([Ending(1, {0: 5}, (5, {"finding": {"rank": 0}}))], 5),
        ([Ending(1)], 0),
        ([CRASH] * 3, 1),
    ],
    ids=["unhealthy", "stop", "corruption", "done", "crashes"],
)
def test_what_ended_a_killed_command_decides_nothing(endings: list[Ending], code: int, folder: Path) -> None:
    """It was killed after it had noted its last end, before its totals: the next command trains."""
    assert command(folder, endings)[0] == code
    rewrite(folder, lambda line: None if line["event"] == "totals" else line)
    found, fleet = command(folder, [CRASH, CRASH, Ending(5)], "launch.max_strikes=9")
    assert (found, len(fleet.started)) == (0, 3), "all tries are there again"
    assert journal(folder)[-1]["starts"] == len(endings) + 3
    assert not (folder / "gave_up.txt").exists()


def test_successor_goes_on_with_its_own_command(folder: Path) -> None:
    """Not with the clock, the steps and the tries of a command that was killed the day before."""
    command(folder, [Ending(5, {0: -9}), CRASH, KILLED])
    rewrite(folder, lambda line: line | {"time": line["time"] - DAY})
    words = ["train.stop_after_seconds=3600", "checkpoint.resume=never", "launch.restarts=1"]
    _, first = command(folder, [KILLED], *words, leader=Leader(1, lambda: None, "second"))
    leader = Leader(2, lambda: None, "second", Earlier("lost"))
    code, fleet = command(folder, [Ending(5)], *words, leader=leader)
    ((limit,),) = [one.overrides for one in fleet.started]
    assert code == 0 and first.started[0].overrides == ()
    assert 3000 < float(limit.removeprefix("train.stop_after_seconds=")) <= 3600
    assert causes(folder) == ["crash", "crash", "supervisor_lost", "node_lost", "done"]
    assert [line["incarnation"] for line in journal(folder) if line["event"] == "start"] == [1, 2, 3, 4, 5]


def test_successor_counts_the_tries_of_its_command(folder: Path) -> None:
    command(folder, [CRASH, CRASH, KILLED], leader=Leader(1, lambda: None, "only"))
    code, fleet = command(folder, [Ending(5)], leader=Leader(2, lambda: None, "only", Earlier("lost")))
    assert (code, fleet.started) == (1, []), "three starts without a new step"


def test_one_node_goes_on_after_several(folder: Path) -> None:
    """Its starts have claim 0, below that of the nodes' last first one."""
    command(folder, [Ending(5, {0: -9}), KILLED], leader=Leader(3, lambda: None, "several"))
    command(folder, [CRASH, KILLED])
    assert command(folder, [Ending(5)])[0] == 0
    assert causes(folder) == ["crash", "supervisor_lost", "crash", "supervisor_lost", "done"]
    totals = journal(folder)[-1]
    assert (totals["starts"], totals["faults"]) == (5, 4)


@pytest.mark.parametrize("seconds", [-3 * DAY, 600.0], ids=["days ago", "clock ahead"])
def test_ledger_where_no_step_was_finished(seconds: float, folder: Path) -> None:
    """The time between two commands is waiting; a clock that was ahead makes no part negative."""
    command(folder, [KILLED])
    rewrite(folder, lambda line: line | {"time": line["time"] + seconds})
    assert command(folder, [CRASH, Ending(5)])[0] == 0
    totals = journal(folder)[-1]
    assert all(totals[name] >= 0 for name in PARTS)
    assert sum(totals[name] for name in PARTS) == pytest.approx(totals["wall_seconds"])
    assert totals["waiting"] == pytest.approx(max(-seconds, 0), abs=60) and totals["starting"] < 60


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda line: {key: value for key, value in line.items() if key != name}


@pytest.mark.parametrize(
    ("change", "starts"),
    [
        (lambda line: without("command")(without("claim")(line)), 3),  # of an older version
        (without("time"), 1),
        (without("newest"), 1),
        (lambda line: line | {"cause": "none that is known"}, 1),
        (lambda line: line | {"time": "NaN"}, 1),
    ],
    ids=["no claim", "no time", "no newest", "cause", "NaN"],
)
def test_journal_of_another_version(
    change: Callable[[dict[str, Any]], dict[str, Any]], starts: int, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is not understood is no reason not to train."""
    command(folder, [CRASH, KILLED])
    rewrite(folder, change)
    assert command(folder, [Ending(5)])[0] == 0
    assert journal(folder)[-1]["starts"] == starts
    assert ("is not understood" in capsys.readouterr().err) == (starts == 1)


def test_metrics_without_a_step_are_left_out(folder: Path) -> None:
    command(folder, [KILLED])
    rewrite(folder, lambda line: line | {"time": line["time"] - 100})
    lines = [{"step": 1, "step_seconds": None}, {"step": 2, "step_seconds": 1.0}, {"other": 1}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert command(folder, [Ending(5)])[0] == 0
    assert [step for step, _ in journal(folder)[1]["finished"]] == [1, 2]


def test_tries_of_an_older_checkpoint_are_counted_on() -> None:
    """A command that begins after steps were taken back does not take them for new ones when they come again."""

    def ended(cause: Cause, before: int, step: int, base: int = 0) -> Start:
        return Start(Fault(cause, 4, ""), before, step, base, ("a",))

    earlier = [ended(Cause.unhealthy, 0, 56), ended(Cause.unhealthy, 56, 56, 50), ended(Cause.supervisor_lost, 56, 56)]
    own = [ended(Cause.unhealthy, 45, 56, 40)]
    assert len(unhealthy_tries([*earlier, *own])) == 2 and len(unhealthy_tries(own)) == 0
    policy = Policy(9, 0.0, True, max_rollback_checkpoints=2)
    decision = decide(own, "a", policy, checkpoints=[30, 40], earlier=earlier)
    assert isinstance(decision, Again) and decision.before_step == 40
