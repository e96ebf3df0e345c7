"""`longcat slurm --submit` on a real Slurm: jobs that are disturbed go on, and end as an undisturbed run does."""

from __future__ import annotations

import itertools
import json
import os
import signal
import tempfile
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pytest

from launch.__main__ import main as longcat
from tests.launch.slurm.conftest import Submit
from tests.support.running import NARROW, exact, exit_json, train_two, wait_for_step
from tests.support.slurm import ENDED, Slurm, log_of, wait

pytestmark = pytest.mark.alone  # Slurm calls nodes lost that answer late
TWO = ["slurm.nodes=2"]


@pytest.fixture
def words(overrides: list[str]) -> list[str]:
    """A run of 40 short steps that saves every 10."""
    return [*overrides, *NARROW, "train.steps=40", "checkpoint.every=10", "logging.every=20"]


@cache
def _undisturbed(words: tuple[str, ...]) -> dict[int, dict[str, str]]:
    with tempfile.TemporaryDirectory() as folder:
        assert train_two([*words, f"run.dir={folder}"]) == [0]
        return exact(Path(folder) / "run")


def ends_as_undisturbed(slurm: Slurm, job: str, words: list[str], folder: Path, starts: int) -> str:
    """Wait for the end of a job, and compare it with the same run on two ranks without Slurm; returns the job's log."""
    log = log_of(slurm.wait_for_state(job, "COMPLETED", seconds=300))
    assert exit_json(folder / "run")["code"] == 0
    assert log.count(": start on ") == starts, log
    assert exact(folder / "run") == _undisturbed(tuple(word for word in words if not word.startswith("run.dir=")))
    return log


def test_killed_rank(slurm: Slurm, submit: Submit, words: list[str], tmp_path: Path) -> None:
    """kill -9 of a rank of the second node: training starts again on the same nodes, without a requeue."""
    job = submit([*words, *TWO])
    wait_for_step(tmp_path / "run", 15)
    os.kill(slurm.training(job)[1], signal.SIGKILL)
    log = ends_as_undisturbed(slurm, job, words, tmp_path, starts=2)
    assert "starts again in" in log and slurm.job(job)["Restarts"] == "0"


@pytest.mark.parametrize("spares", [0, 1])
def test_corrupt_node_is_barred(slurm: Slurm, submit: Submit, words: list[str], tmp_path: Path, spares: int) -> None:
    """Its name comes from Slurm: several nodes are on one host here. On a spare node, else queued again without it."""
    program = tmp_path / "program"
    program.write_text(
        f"""#!/bin/bash
cd '{tmp_path}/run'
if [ ! -f found ]; then
    echo $SLURMD_NODENAME >found
    echo '{{"code": 5, "finding": {{"host": "here", "node": "'$SLURMD_NODENAME'"}}}}' >exit.json
    exit 5
fi
echo $SLURMD_NODENAME >second
echo '{{"code": 0}}' >exit.json
"""
    )
    program.chmod(0o755)
    job = submit([*words, f"slurm.program={program}", f"slurm.spares={spares}"])
    ended = slurm.wait_for_state(job, "COMPLETED")
    first, second = ((tmp_path / "run" / name).read_text().strip() for name in ("found", "second"))
    assert first != second and (tmp_path / "run" / "slurm.bad_nodes").read_text() == f"{first}\n", log_of(ended)
    expected = ("0", "(null)") if spares else ("1", first)
    assert (ended["Restarts"], ended["ExcNodeList"]) == expected, log_of(ended)


def test_environment_reaches_the_ranks(
    slurm: Slurm, submit: Submit, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clusters that set SBATCH_EXPORT=NONE let srun take nothing along, not even PATH: no node answered the script."""
    monkeypatch.setenv("SBATCH_EXPORT", "NONE")
    program = tmp_path / "program"
    program.write_text(f"#!/bin/bash\necho \"$COLOUR $PYTHONSAFEPATH\" >'{tmp_path}/seen'\n")
    program.chmod(0o755)
    job = submit([*words, f"slurm.program={program}", "slurm.env.COLOUR=dark red", "slurm.max_requeues=0"])
    log = log_of(slurm.wait_for_state(job, *ENDED))
    assert (tmp_path / "seen").is_file(), log
    assert (tmp_path / "seen").read_text() == "dark red 1\n"


def test_submission_that_slurm_refuses(slurm: Slurm, words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with patch.dict(os.environ, slurm.environment):
        assert longcat(["slurm", *words, "slurm.partition=nowhere", "--submit"]) == 2
    assert "invalid partition specified: nowhere" in capfd.readouterr().err


def test_wrong_configuration_ends_the_job(slurm: Slurm, submit: Submit, words: list[str], tmp_path: Path) -> None:
    """What only a node can see: here, a corpus that is gone. One start, code 2, the reason in the log.

    A blank and `%` in the path of the run folder reach Slurm as they are.
    """
    job = submit([*words, "data.paths=[/nowhere/corpus]", f"run.dir='{tmp_path}/my runs 50% j'"])
    ended = slurm.wait_for_state(job, "FAILED")
    assert ended["ExitCode"] == "2:0" and ended["Restarts"] == "0", log_of(ended)
    log = (tmp_path / "my runs 50% j" / "run" / f"slurm-{job}.log").read_text()
    said = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "/nowhere/corpus" in said[0], said


@pytest.mark.long
def test_undisturbed_job(slurm: Slurm, submit: Submit, words: list[str], tmp_path: Path) -> None:
    log = ends_as_undisturbed(slurm, submit([*words, *TWO]), words, tmp_path, starts=1)
    assert "(fsdp 2)" in log


@pytest.mark.long
def test_restarts_inside_the_job(slurm: Slurm, submit: Submit, words: list[str], tmp_path: Path) -> None:
    """With launch.restarts a killed rank and a lost node cost no start of the script; the spare node has joined."""
    words = [*words, "train.steps=60"]
    restarts = ["launch.restarts=3", "launch.backoff_seconds=0.5", "launch.node_timeout=20"]
    job = submit([*words, *TWO, *restarts, "slurm.spares=1"])
    wait_for_step(tmp_path / "run", 12)
    os.kill(slurm.training(job)[1], signal.SIGKILL)
    wait_for_step(tmp_path / "run", 25)
    node = slurm.nodes_of(job)[1]
    try:
        slurm.lose_node(node)
        log = ends_as_undisturbed(slurm, job, words, tmp_path, starts=1)
    finally:
        slurm.restore(node)
    lines = [json.loads(line) for line in (tmp_path / "run" / "launch.jsonl").read_text().splitlines()]
    assert [line["cause"] for line in lines if line["event"] == "end"] == ["crash", "node_lost", "done"], log


@pytest.mark.long
def test_request_to_save_and_start_again(slurm: Slurm, submit: Submit, words: list[str], tmp_path: Path) -> None:
    """What Slurm sends before the time limit, sent by hand; no step is trained twice."""
    job = submit([*words, *TWO])
    wait_for_step(tmp_path / "run", 15)
    slurm.command("scancel", "--batch", "--signal=USR1", job)
    log = ends_as_undisturbed(slurm, job, words, tmp_path, starts=2)
    assert "queued again: stopped for the time limit, saved" in log
    assert not (tmp_path / "run" / "superseded.jsonl").exists()


@pytest.mark.long
def test_time_limit(slurm: Slurm, submit: Submit, words: list[str], tmp_path: Path) -> None:
    """Two minutes, of a run that takes longer: Slurm's own signal comes 45 to 105 s before."""
    words = [*words, "train.steps=1000000", "logging.every=1000", "logging.hash_every=1000", "checkpoint.every=1000"]
    job = submit([*words, *TWO, "slurm.time=2", "slurm.signal_seconds=45"])
    wait(lambda: slurm.job(job).get("Restarts") == "1", 240, "the job was not queued again")
    assert exit_json(tmp_path / "run")["code"] == 3
    reached = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    slurm.wait_for_state(job, "RUNNING")
    wait_for_step(tmp_path / "run", reached + 5, seconds=240)
    assert not (tmp_path / "run" / "superseded.jsonl").exists(), "no step was lost"
    log = log_of(slurm.job(job))
    assert "USR1: the ranks save and stop" in log and "queued again: stopped for the time limit, saved" in log


def test_cancelled_job(slurm: Slurm, submit: Submit, words: list[str], tmp_path: Path) -> None:
    """It saves and is not queued again; the next job goes on where it stopped."""
    job = submit([*words, *TWO])
    wait_for_step(tmp_path / "run", 15)
    slurm.command("scancel", job)
    slurm.wait_for_state(job, "CANCELLED")
    wait(lambda: not slurm.training(job), 60, "its ranks live")
    assert exit_json(tmp_path / "run")["code"] == 3
    job = submit([*words, *TWO])
    ends_as_undisturbed(slurm, job, words, tmp_path, starts=1)
    assert not (tmp_path / "run" / "superseded.jsonl").exists()


NODES = ("first node", "second node")
IN_EVERY_RUN = (("slurmd", 1, 1), ("down", 1, 1))  # of the tests; the others wait minutes for Slurm
LOSSES = [
    pytest.param(
        *case, marks=[] if case in IN_EVERY_RUN else [pytest.mark.long], id=f"{case[0]}-{NODES[case[1]]}-{case[2]}"
    )
    for case in itertools.product(("slurmd", "machine", "down"), (0, 1), (0, 1))
]


@pytest.mark.parametrize(("kind", "position", "spares"), LOSSES)
def test_lost_node(
    kind: str, position: int, spares: int, slurm: Slurm, submit: Submit, words: list[str], tmp_path: Path
) -> None:
    """kill -9 of a slurmd alone, of all that runs on a node, `state=down`: on the spare node, or queued again.

    The first node is the one that the script runs on.
    """
    if spares and not position:
        pytest.skip("with --no-kill Slurm keeps a job whose script is gone (docs/guide/slurm.md)")
    words = [*words, "train.steps=60", "checkpoint.every=20"]
    job = submit([*words, *TWO, f"slurm.spares={spares}"])
    wait_for_step(tmp_path / "run", 15)
    node = slurm.nodes_of(job)[position]
    try:
        {
            "slurmd": slurm.kill_daemon,
            "machine": slurm.lose_node,
            "down": lambda node: slurm.command("scontrol", "update", f"NodeName={node}", "State=down", "Reason=test"),
        }[kind](node)
        # A job that waits for three nodes gets the third one back; one that has another goes on without it
        wait(lambda: slurm.job(job)["JobState"] in ("PENDING", "COMPLETED"), 400, "the job neither ends nor is queued")
        slurm.restore(node)
        slurm.wait_for_state(job, "COMPLETED", seconds=400)
        assert exit_json(tmp_path / "run")["code"] == 0
        assert exact(tmp_path / "run") == _undisturbed(tuple(word for word in words if not word.startswith("run.dir=")))
    finally:
        slurm.restore(node)
