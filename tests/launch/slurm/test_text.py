"""The script of `longcat slurm` as a text, and what is refused before it is written."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from launch.__main__ import main as longcat
from launch.slurm.nodes import spans
from launch.slurm.options import SlurmOptions, seconds_of, split_slurm_options
from launch.slurm.script import signal_time
from longcat.errors import ConfigError
from parallel.mesh import MeshSizes
from tests.support.fixtures import Refused
from tests.support.slurm_script import Script
from train.checkpoint.save_times import SAVES


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
    assert "apptainer exec --nv" in text and "/data:/data,/scratch:/tmp image.sif longcat train launch.nodes=2 " in text
    assert not re.search(r"\{[a-z_]+\}", text.replace("${", "")), "a placeholder is left"


def test_keys_reach_longcat_train_as_they_are(tmp_path: Path) -> None:
    script = Script(tmp_path, ['data.paths=["a b/it\'s"]', "slurm.program=echo", "slurm.nodes=2"])
    script.ends(script.start("none2"))
    calls = script.calls.read_text()
    assert "echo train launch.nodes=2 launch.rendezvous=10.0.0.1:" in calls and 'data.paths=["a b/it\'s"]' in calls


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
    script.path.write_bytes(b"\xff\xfe")
    Script(tmp_path, [])
    assert (script.run / "slurm.sh.2").read_bytes() == b"\xff\xfe", "so is one that is no text"


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
        ("slurm.mounts=/data", "slurm.mounts=/data is for a container"),
        ("slurm.runtime=pyxis", "slurm.runtime=pyxis is for a container"),
        ("slurm.sbatch.Comment x=4", "no long option of sbatch"),
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
    refused([*words, "slurm.nodes=2", "launch.nodes=4"], "launch.nodes=4 and slurm.nodes=2 differ")
    refused([*words, "launch.nodes=4", "launch.rendezvous=a:1"], "launch.nodes=4 and slurm.nodes=1 differ")
    refused([*words, "slurm.nodes=2", "launch.rendezvous=a:1"], "launch.rendezvous=a:1", "leave it out")
    refused([*words, "-m", "optim.lr=1,2"], "submitit_slurm")
    refused([*words, f"slurm.measured={tmp_path}"], "slurm.measured")
    refused([*words, f"slurm.measured={tmp_path}", "slurm.signal_seconds=60"], "both say when Slurm signals")
    refused([*words, 'slurm.sbatch.comment="mine"'], "slurm.sbatch.comment")
    assert not (tmp_path / "runs").exists()
    monkeypatch.setenv("PATH", "/nowhere")
    assert longcat([*words, "--submit"]) == 2


def test_home_is_found_in_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """bash and zsh leave `~` as it is behind `slurm.venv=`."""
    monkeypatch.setenv("HOME", "/home/me")
    options, _ = split_slurm_options(["slurm.container=~/a.sif", "slurm.mounts=~/data,/b,~/c:/d", "slurm.measured=~/r"])
    assert (options.container, options.measured) == ("/home/me/a.sif", "/home/me/r")
    assert options.mounts == "/home/me/data,/b,/home/me/c:/d"
    options, _ = split_slurm_options(["slurm.venv=~/venv", "slurm.script=~/job.sh", "slurm.job_name=~x"])
    assert (options.venv, options.script, options.job_name) == ("/home/me/venv", "/home/me/job.sh", "~x")


def test_values_of_sbatch_lines_are_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A blank ends a value that is not quoted, and `%` begins a pattern in the path of the log."""
    folder = tmp_path / "my runs 50% job"
    folder.mkdir()
    monkeypatch.chdir(folder)
    lines = Script(folder, ["slurm.job_name=a b", "slurm.sbatch.comment=for me", "slurm.qos=high"]).path.read_text()
    log = f"{tmp_path}/my runs 50%% job/runs/mine/slurm-%j.log"
    for option in (f'chdir="{folder}"', f'output="{log}"', 'job-name="a b"', 'comment="for me"', "qos=high"):
        assert f"#SBATCH --{option}\n" in lines, option


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("sbatch: error: Batch job submission failed: Invalid account specified", 2),
        ("sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)", 1),
        ("sbatch: error: Batch job submission failed: Socket timed out on send/recv operation", 1),
        (
            "sbatch: error: resolve_ctls_from_dns_srv: res_nsearch error: Unknown host\n"
            "sbatch: error: fetch_config: DNS SRV lookup failed\n"
            "sbatch: fatal: Could not establish a configuration source",
            1,
        ),
        ("sbatch: error: Batch job submission failed: Protocol authentication error", 1),
        ("sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received", 1),
        ("sbatch: error: Batch job submission failed: Requested node configuration is not available", 2),
        ("sbatch: error: invalid partition specified: gpuu", 2),
    ],
)
def test_code_of_a_refused_submission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], said: str, code: int
) -> None:
    """2 where another input helps, as everywhere; 1 where the cluster does not answer."""
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/bash\necho '{said}' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert longcat(["slurm", "model=debug", f"run.dir={tmp_path}/runs", "--submit"]) == code
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith("error: sbatch ") and said.rpartition(": ")[2] in line
