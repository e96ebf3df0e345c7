"""The script of `longcat slurm`: text, refusals, and what it does after each end of training, without a Slurm."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from launch.__main__ import main as longcat
from launch.slurm.nodes import spans
from launch.slurm.options import SlurmOptions, seconds_of, split_slurm_options
from launch.slurm.script import signal_time
from longcat.errors import ConfigError
from parallel.mesh import MeshSizes
from tests.support.fixtures import Refused
from train.checkpoint.save_times import SAVES

# Stand-ins for Slurm's programs: each notes its words. Each start ends as the next line of the file `ends` says; nodes
# in $DEAD do not answer; scontrol requeue ends the script as Slurm does
PROGRAMS = {
    "srun": r"""
        if [ "${!#}" = true ]; then
            [ -n "$SLOW" ] && /bin/sleep 0.5
            for node in $DEAD; do [[ "$*" == *"=$node "* ]] && exit 1; done
            exit 0
        fi
        echo "srun $*" >>"$CALLS"
        end=$(head -n 1 "$ENDS"); sed -i 1d "$ENDS"
        case $end in
        wait) trap 'echo "{\"code\": 3}" >"$RUN/exit.json"; exit 143' TERM; echo $$ >"$RUN/srun.pid"
            while :; do read -rt 0.02 <> <(:); done ;;
        none*) exit "${end#none}" ;;
        *) printf '%s' "$end" >"$RUN/exit.json"; exit 143 ;;
        esac""",
    "scontrol": r"""
        echo "scontrol $*" >>"$CALLS"
        case "$*" in
        "show hostnames"*) printf 'n1\nn2\nn3\n' ;;
        "-o show node"*) echo "NodeName=n1 NodeAddr=10.0.0.1 NodeHostName=n1" ;;
        requeue*) kill -TERM "$PPID" ;;
        esac""",
    "squeue": "printf '7.0 longcat\\n7.1 watch\\n'",
    "scancel": r"""echo "scancel $*" >>"$CALLS"; [ -f "$RUN/srun.pid" ] && kill -TERM "$(cat "$RUN/srun.pid")"; true""",
    "sleep": r"""[ "$1" -lt 5 ] && exec /bin/sleep "$1"; echo "sleep $1" >>"$CALLS"; [ "$1" -lt 200 ]""",
}
FINDING = {"code": 5, "message": 'a "host": "n1" is no host', "finding": {"kind": "update", "rank": 1, "host": "n2"}}


class Script:
    """A script that `longcat slurm` wrote, run by bash with stand-ins for Slurm's programs."""

    def __init__(self, folder: Path, words: list[str]) -> None:
        self.run = folder / "runs" / "mine"
        assert longcat(["slurm", "model=debug", f"run.dir={self.run.parent}", "run.name=mine", *words]) == 0
        self.path = self.run / "slurm.sh"
        self.calls, self.log = folder / "calls", folder / "log"
        programs = folder / "programs"
        programs.mkdir(exist_ok=True)
        for name, text in PROGRAMS.items():
            (programs / name).write_text(f"#!/bin/bash\n{text}\n")
            (programs / name).chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "ENDS": str(folder / "ends"),
            "DEAD": "",
            "SLOW": "",
            "RUN": str(self.run),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_JOB_NUM_NODES": "2",
        }

    def start(self, *ends: str, **environment: str) -> subprocess.Popen[str]:
        """Start the script; its starts of training end in turn as ``ends`` say."""
        self.calls.write_text("")
        Path(self.environment["ENDS"]).write_text("".join(f"{end}\n" for end in ends))
        return subprocess.Popen(
            ["bash", str(self.path)],
            env={**self.environment, **environment},
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            text=True,
        )

    def ends(self, process: subprocess.Popen[str]) -> tuple[int, bool, str]:
        """(exit code, whether it was queued again, output)."""
        code = process.wait(30)
        return code, "scontrol requeue 7" in self.calls.read_text(), self.log.read_text()

    def starts(self) -> list[str]:
        """The nodes of each start of training."""
        return re.findall("^srun .*--nodelist=(\\S+)", self.calls.read_text(), re.M)

    def signalled(self, number: signal.Signals) -> tuple[int, bool, str]:
        process = self.start("wait")
        limit = time.monotonic() + 10
        while not (self.run / "srun.pid").exists():
            assert time.monotonic() < limit
            time.sleep(0.01)
        process.send_signal(number)
        ended = self.ends(process)
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((self.run / "srun.pid").read_text()), signal.SIGKILL)
        (self.run / "srun.pid").unlink()
        return ended


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Script:
    return Script(tmp_path_factory.mktemp("script"), ["slurm.nodes=2"])


@pytest.fixture
def script(written: Script) -> Script:
    """A script of two nodes that has not been started yet."""
    (written.run / "slurm.starts").unlink(missing_ok=True)
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
    ],
)
def test_exit_json_decides_what_follows(script: Script, end: str, code: int, starts: int) -> None:
    """srun's own code is 143 each time; a code of 2 alone, without an exit.json, says that the start was refused."""
    assert script.ends(script.start(end, DONE))[:2] == (code, False)
    assert script.starts() == ["n1,n2"] * starts


def test_an_old_exit_json_is_not_read(script: Script) -> None:
    (script.run / "exit.json").write_text('{"code": 4, "message": "of before"}')
    code, queued, output = script.ends(script.start("none137", DONE))
    assert (code, queued) == (0, False) and "exit code unknown" in output


def test_corruption_bars_its_node(script: Script) -> None:
    code, queued, output = script.ends(script.start(json.dumps(FINDING), DONE))
    assert (code, queued) == (0, False) and "never again on n2" in output
    assert "scontrol update JobId=7 ExcNodeList=n2\n" in script.calls.read_text()
    assert script.starts() == ["n1,n2", "n1,n3"]


def test_a_node_that_answers_takes_the_place(script: Script) -> None:
    assert script.ends(script.start("none1", DONE, DEAD="n2"))[:2] == (0, False)
    assert script.starts() == ["n1,n3", "n1,n3"]


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


def test_cancelled_between_starts(script: Script) -> None:
    """A job that someone cancels while it looks for nodes is not queued again, although they answer no more."""
    process = script.start(DONE, DEAD="n1 n2 n3", SLOW="1")
    time.sleep(0.4)
    process.send_signal(signal.SIGTERM)
    assert script.ends(process)[:2] == (1, False) and script.starts() == []


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


def test_script_is_clean_shell(tmp_path: Path) -> None:
    """Every option at once; keys with spaces and quotes reach longcat train as they are."""
    words = [
        "slurm.nodes=2", "slurm.spares=1", "slurm.time=2-12", "slurm.partition=gpu", "slurm.account=me",
        "slurm.qos=high",
        "slurm.gpus_per_node=8", "slurm.cpus_per_node=64", "slurm.mail=me@example.org", "slurm.container=image.sif",
        "slurm.mounts=/data,/scratch:/tmp", "slurm.setup=module load cuda", "slurm.env.NCCL_IB_HCA=mlx5_0,mlx5_1",
        "slurm.sbatch.reservation=big", "slurm.sbatch.reboot=", "data.paths=[\"a b/it's\"]", "parallel.tp=4",
        "train.global_batch_size=16",
    ]  # fmt: skip
    path = Script(tmp_path, words).path
    text = path.read_text()
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", "-e", "SC1091", str(path)], capture_output=True, text=True).stdout == ""
    lines = {line.partition("   #")[0] for line in text.splitlines()}
    for option in (
        "nodes=3", "time=2-12", "partition=gpu", "account=me", "qos=high", "gpus-per-node=8", "cpus-per-task=64",
        "no-kill", "requeue", "open-mode=append", "signal=B:USR1@300", "reservation=big", "reboot",
        "mail-user=me@example.org", "ntasks-per-node=1",
    ):  # fmt: skip
        assert f"#SBATCH --{option}" in lines, option
    assert "export NCCL_IB_HCA=mlx5_0,mlx5_1" in lines and "module load cuda" in lines
    assert "apptainer exec --nv" in text and "/data:/data,/scratch:/tmp image.sif torchrun --nnodes=2 " in text
    assert not re.search(r"\{[a-z_]+\}", text.replace("${", "")), "a placeholder is left"


def test_keys_reach_longcat_train_as_they_are(tmp_path: Path) -> None:
    script = Script(tmp_path, ['data.paths=["a b/it\'s"]', "slurm.program=echo"])
    script.ends(script.start("none2"))
    assert (
        "echo train model=debug" in script.calls.read_text() and 'data.paths=["a b/it\'s"]' in script.calls.read_text()
    )


def test_container_of_pyxis(tmp_path: Path) -> None:
    text = Script(tmp_path, ["slurm.container=nvcr.io#nvidia/pytorch:25.10-py3", "slurm.mounts=/data"]).path.read_text()
    assert "--container-image='nvcr.io#nvidia/pytorch:25.10-py3'" in text and ",/data:/data" in text
    assert f"--container-workdir={Path.cwd()}" in text and "\n        longcat train" in text


def test_a_changed_script_is_kept(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = Script(tmp_path, [])
    assert capfd.readouterr().out == f"{script.path}\n"
    script.path.write_text("mine")
    Script(tmp_path, [])
    assert f"{script.path} was there and differed; it is now {script.path}.1" in capfd.readouterr().err
    assert (script.run / "slurm.sh.1").read_text() == "mine"
    Script(tmp_path, [])
    assert not (script.run / "slurm.sh.2").exists(), "an equal script is written in place"


def test_signal_comes_from_measured_saves(tmp_path: Path) -> None:
    """Two saves (one may have begun), two steps and half a minute; a default without measurements."""
    options = SlurmOptions(time="24:00:00")
    assert signal_time(options, tmp_path).seconds == 300
    assert signal_time(SlurmOptions(time="4"), tmp_path).seconds == 60
    (tmp_path / SAVES).write_text('{"step": 1, "save_seconds": 20.0}\n{"step": 2, "save_seconds": 41.5}\n')
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "step_seconds": 12.0}\n{"step": 2, "step_seconds": 3.0}\n')
    assert signal_time(options, tmp_path).seconds == 83 + 24 + 30
    assert "slowest save" in signal_time(options, tmp_path).reason
    assert signal_time(SlurmOptions(signal_seconds=9), tmp_path).seconds == 9
    with pytest.raises(ConfigError, match=re.escape("slurm.time=4 is too short")):
        signal_time(SlurmOptions(time="4"), tmp_path)


def test_layout_over_nodes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Each group that leaves its node is named, with a size that does not."""
    sizes = MeshSizes(pp=1, dp=1, fsdp=2, cp=2, tp=4, ep=16)
    assert spans(sizes, 16) == {"tp": 1, "cp": 1, "ep": 1}
    assert spans(sizes, 8) == {"tp": 1, "cp": 1, "ep": 2}
    assert spans(sizes, 4) == {"tp": 1, "cp": 2, "ep": 4}
    assert spans(sizes, 6) == {"tp": 2, "cp": 2, "ep": 3}
    Script(tmp_path, ["slurm.nodes=2", "run.num_processes=4", "parallel.ep=8"])
    assert "parallel.ep=8 spans 2 nodes of 4 ranks" in (said := capfd.readouterr().err)
    assert "parallel.ep=4 stays inside a node" in said


@pytest.mark.parametrize(
    "text, seconds",
    [("90", 5400), ("1:30", 90), ("1:00:00", 3600), ("2-12", 216000), ("1-0:30", 88200), ("0-1:0:5", 3605)],
)
def test_time_limits_are_read_as_slurm_does(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "word, message",
    [
        ("slurm.node=2", "unknown key 'slurm.node'; the nearest is 'slurm.nodes'"),
        ("slurm.nodes=0", "slurm.nodes=0 must be at least 1"),
        ("slurm.nodes=two", "slurm.nodes=two must be a whole number"),
        ("slurm.time=1h", "slurm.time=1h is no time limit"),
        ("slurm.time=0", "slurm.time=0 is no time"),
        ("slurm.signal_seconds=90000", "not before the time limit"),
        ("slurm.runtime=docker", "slurm.runtime"),
        ("slurm.sbatch.nodes=4", "use slurm.nodes and slurm.spares"),
        ("slurm.sbatch.array=0-4", "submitit_slurm"),
        ("slurm.env.1A=2", "slurm.env.1A"),
        ("slurm.partition", "write slurm.partition=VALUE"),
        ("slurm.account=a\nb", "slurm.account has a line feed"),
    ],
)
def test_wrong_options_are_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        split_slurm_options([word])


def test_wrong_jobs_are_refused(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written for a job that could not start."""
    words = ["slurm", "model=debug", f"run.dir={tmp_path}/runs"]
    refused([*words, "slurm.nodes=2", "parallel.tp=3"], "parallel.tp=3")
    refused([*words, "slurm.nodes=3"], "train.global_batch_size=8")
    refused([*words, "slurm.gpus_per_node=4", "run.num_processes=8"], "run.num_processes=8")
    refused([*words, "-m", "optim.lr=1,2"], "submitit_slurm")
    refused([*words, f"slurm.measured={tmp_path}"], "slurm.measured")
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv("PATH", "/nowhere")
    assert longcat([*words, "--submit"]) == 2
