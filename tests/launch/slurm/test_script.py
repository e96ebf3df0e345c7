"""What the script of `longcat slurm` does after each end of training and at signals, without a Slurm."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import pytest

from tests.support.slurm_script import SAVED, Script

FINDING = {
    "code": 5,
    "message": 'a "node": "n1" is no node',
    "finding": {"kind": "update", "suspects": [{"node": "n2"}, {"node": "n3"}], "host": "one", "node": "n2"},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Script:
    return Script(tmp_path_factory.mktemp("script"), ["slurm.nodes=2"])


@pytest.fixture
def script(written: Script) -> Script:
    """A script of two nodes that has not been started yet."""
    for name in ("starts", "bad_nodes"):
        (written.run / f"slurm.{name}").unlink(missing_ok=True)
    return written


DONE = '{"code": 0, "message": "done"}'


@pytest.mark.parametrize(
    "end, code, starts",
    [
        (DONE, 0, 1),
        ('{"code": 2, "message": "2 is wrong"}', 2, 1),
        ('{"code": 3, "message": "stopped on train.stop_after_seconds"}', 3, 1),
        ('{"code": 4, "message": "not finite"}', 4, 1),
        ('{"code": 1, "message": "a crash, \\"code\\": 0"}', 0, 2),
        ("none143", 0, 2),
        ("none2", 2, 1),
        ("none0", 0, 1),
        ("refused", 2, 1),
    ],
)
def test_exit_json_decides_what_follows(script: Script, end: str, code: int, starts: int) -> None:
    """srun's own code is 143 each time. Without an exit.json 2 alone says that the program refused its arguments, and 0
    that all ranks are done; ranks that refuse a configuration leave a file, where torchrun ends in 1.
    """
    assert script.ends(script.start(end, DONE))[:2] == (code, False)
    assert script.starts() == ["n1,n2"] * starts


def test_an_old_exit_json_is_not_read(script: Script) -> None:
    (script.run / "exit.json").write_text('{"code": 4, "message": "of before"}')
    code, queued, output = script.ends(script.start("none137", DONE))
    assert (code, queued) == (0, False) and "exit code unknown" in output


def test_corruption_bars_its_node(script: Script) -> None:
    """Another node of the job takes its place; a later start of the job, and a later job, leave it out too."""
    code, queued, output = script.ends(script.start(json.dumps(FINDING), DONE))
    assert (code, queued) == (0, False) and "never again on n2" in output
    assert script.starts() == ["n1,n2", "n1,n3"] and (script.run / "slurm.bad_nodes").read_text() == "n2\n"
    assert script.ends(script.start(DONE, SLURM_JOB_ID="8"))[0] == 0 and script.starts() == ["n1,n3"]


def test_corruption_without_a_spare_node(script: Script) -> None:
    """Slurm takes excluded nodes only of a job that waits: it is held until it has them, beside those of its user."""
    code, queued, output = script.ends(script.start(json.dumps(FINDING), DEAD="n3", EXCLUDED="n[8-9]"))
    assert (code, queued) == (0, True) and "cannot" not in output and script.starts() == ["n1,n2"]
    assert script.commands() == ["requeuehold 7", "update JobId=7 ExcNodeList=n[8-9],n2", "release 7"]


def test_corruption_near_the_time_limit(script: Script) -> None:
    code, queued, output = script.signalled(signal.SIGUSR1, end=f"wait{json.dumps(FINDING)}")
    assert (code, queued) == (0, True) and "never again on n2" in output
    assert "update JobId=7 ExcNodeList=n2" in script.commands()


def test_corruption_on_a_host_without_node_name(script: Script) -> None:
    """The host's short name, if it is a node of the job."""
    for host, starts in (("n1.cluster.org", ["n1,n2", "n2,n3"]), ("elsewhere", ["n2,n3", "n2,n3"])):
        found = FINDING | {"finding": {"suspects": [{"host": host, "node": None}], "host": host, "node": None}}
        code, queued, output = script.ends(script.start(json.dumps(found), DONE))
        assert (code, queued) == (0, False) and script.starts() == starts
    assert "names no node of this job" in output


def test_a_node_that_answers_takes_the_place(script: Script) -> None:
    assert script.ends(script.start("none1", DONE, DEAD="n2"))[:2] == (0, False)
    assert script.starts() == ["n1,n3", "n1,n3"]


def test_spare_nodes_join_where_longcat_restarts(tmp_path: Path) -> None:
    """What it has given up a person has to mend: the script starts nothing again."""
    script = Script(tmp_path, ["slurm.nodes=2", "slurm.spares=1", "launch.restarts=3"])
    assert script.ends(script.start("none1", DONE))[:2] == (0, False) and script.starts() == ["n1,n2,n3"] * 2
    assert "--nodes=3 --ntasks=3" in script.calls.read_text() and "launch.nodes=2" in script.path.read_text()
    code, queued, output = script.ends(script.start("gave", DONE))
    assert (code, queued) == (1, False) and "gave_up.txt" in output and script.starts() == ["n1,n2,n3"]
    (script.run / "slurm.starts").unlink()
    assert script.ends(script.start("forgets", DONE, DEAD="n2"))[:2] == (0, False), "gave_up.txt was removed"
    assert script.starts() == ["n1,n3"] * 2
    line = '{"event": "end", "cause": "corruption", "code": 5, "nodes": ["n2"], "message": "n1"}'
    (script.run / "slurm.starts").unlink()
    assert script.ends(script.start(f"journal{line}", DONE))[:2] == (0, False) and script.starts()[-1] == "n1,n3"
    assert (script.run / "slurm.bad_nodes").read_text() == "n2\n"


def test_only_several_nodes_restart_inside(tmp_path: Path) -> None:
    script = Script(tmp_path, ["slurm.spares=1", "launch.restarts=3"])
    assert script.ends(script.start("none1", DONE))[:2] == (0, False) and script.starts() == ["n1"] * 2


def test_too_few_nodes_are_left_to_slurm(script: Script) -> None:
    """Another allocation has nodes that answer."""
    code, queued, output = script.ends(script.start(DONE, DEAD="n2 n3"))
    assert (code, queued) == (0, True) and script.starts() == [] and "fewer than 2 nodes answer" in output


def test_a_signal_saves_and_decides(script: Script) -> None:
    """USR1 is the time limit's: the job goes on. TERM is a person's or a preemption's: it ends."""
    code, queued, output = script.signalled(signal.SIGUSR1)
    assert (code, queued) == (0, True) and "stopped for the time limit, saved" in output
    assert "scancel --signal=TERM 7.0\n" in script.calls.read_text()
    code, queued, output = script.signalled(signal.SIGTERM)
    assert (code, queued) == (3, False) and "signal TERM" in output


def test_a_signal_while_srun_starts(script: Script) -> None:
    """Slurm does not know the step of the ranks yet."""
    for number, queued in ((signal.SIGUSR1, True), (signal.SIGTERM, False)):
        ended = script.signalled(number, REGISTERS="1.5")
        assert ended[:2] == (0 if queued else 3, queued) and "exit code 3" in ended[2]
        assert "scancel --signal=TERM 7.0\n" in script.calls.read_text()


def test_a_signal_before_the_first_step(script: Script) -> None:
    """It ends ranks that do not listen yet; the checkpoints are all there is."""
    assert script.signalled(signal.SIGTERM, end="killed")[:2] == (3, False)


def test_a_job_that_is_to_stop_stops(script: Script) -> None:
    """The time limit comes while the ranks save for someone who wants the job to stop."""
    process = script.start(f"saves{SAVED}")
    script.wait_for((script.run / "srun.pid").exists)
    process.send_signal(signal.SIGTERM)
    script.wait_for(lambda: "TERM: the ranks save" in script.log.read_text())
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    (script.calls.parent / "calls.saved").touch()
    assert script.ends(process)[:2] == (3, False)
    (script.run / "srun.pid").unlink()


def test_cancelled_between_starts(script: Script) -> None:
    """A job that someone cancels while it looks for nodes ends at once: they need not answer first."""
    process = script.start(DONE, TOGETHER="99")
    script.wait_for(lambda: list(script.calls.parent.glob("calls.asked.*")))
    process.send_signal(signal.SIGTERM)
    code, queued, output = script.ends(process)
    assert (code, queued) == (3, False) and script.starts() == [] and "while no ranks ran" in output


def test_nodes_are_asked_together(script: Script) -> None:
    assert script.ends(script.start(DONE, TOGETHER="3"))[0] == 0 and script.starts() == ["n1,n2"]


@pytest.mark.parametrize("value", ["never", "own"])
def test_checkpoint_resume_counts_once(tmp_path: Path, value: str) -> None:
    """Until a start has loaded its checkpoint and written config.yaml; then from the newest, in a further job too."""
    if value == "own":
        folder = tmp_path / "runs/mine/checkpoints/step-00000100"
        folder.mkdir(parents=True)
        value = str(folder)
    script = Script(tmp_path, [f"checkpoint.resume={value}"])

    def resumed(*ends: str, job: str) -> list[str]:
        assert script.ends(script.start(*ends, SLURM_JOB_ID=job))[0] == 0
        return re.findall("checkpoint\\.resume=(\\S+)$", script.calls.read_text(), re.M)

    assert resumed("none1", "begun", DONE, job="7") == [value, value, "auto"]
    assert resumed(DONE, job="8") == ["auto"]
    (script.run / "slurm.resume").unlink()
    assert resumed(DONE, job="9") == [value]


def test_setup_may_use_variables_that_are_not_set(tmp_path: Path) -> None:
    script = Script(tmp_path, ["slurm.setup=echo set up$NOT_SET_ANYWHERE"])
    code, _, output = script.ends(script.start(DONE))
    assert code == 0 and output.startswith("set up\n")


def test_starts_without_progress_end_the_job(tmp_path: Path) -> None:
    """Only starts that leave no new checkpoint count, also over a requeue; another job starts anew."""
    script = Script(tmp_path, ["slurm.max_failures=2"])
    for step in (10, 20):
        (script.run / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
        assert script.ends(script.start("none1", DONE))[0] == 0
    code, queued, output = script.ends(script.start("none1", "none1", DONE, SLURM_RESTART_COUNT="1"))
    assert (code, queued) == (1, False) and "gives up: 2 starts in a row" in output and "step-00000020" in output
    assert len(script.starts()) == 0 and script.ends(script.start("none1", DONE, SLURM_JOB_ID="8"))[0] == 0
    code, queued, output = script.ends(script.start("none1", "none1", DONE, SLURM_JOB_ID="9"))
    assert (
        code == 1
        and len(script.starts()) == 2
        and re.findall(r"sleep \d+", script.calls.read_text())
        == [
            "sleep 5",
            "sleep 10",
        ]
    )


def test_number_of_starts_is_bounded(script: Script) -> None:
    code, queued, output = script.ends(script.start(DONE, SLURM_RESTART_COUNT="1000", DEAD="n1 n2"))
    assert (code, queued) == (1, False) and "not queued again after 1000 times" in output


def test_ranks_that_do_not_save_are_started_again(tmp_path: Path) -> None:
    """At the time limit itself Slurm would end the job for good."""
    script = Script(tmp_path, ["slurm.signal_seconds=2"])
    text = script.path.read_text()
    assert "sleep 1 " in text
    script.path.write_text(text.replace("scancel --signal=TERM", "true"))
    code, queued, output = script.signalled(signal.SIGUSR1)
    assert (code, queued) == (0, True) and "had not saved 1 s after USR1" in output
