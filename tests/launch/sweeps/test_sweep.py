"""Sweeps: a folder for each, runs in this process or a launcher's, and every failure shown and in the exit code."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.errors import HydraException

from launch.__main__ import main as longcat
from launch.sweeps.folder import SWEEP, note_finished
from launch.sweeps.sweep import report, results, run_sweep
from tests.support.fixtures import Refused
from tests.support.running import NARROW, lines, run_cleanly
from train.process.stop import Interrupted
from train.run_dir.folder import lock
from train.sweeps.pruning import Pruner
from train.sweeps.results import SWEEP_FOLDER, Result, write_result


@pytest.fixture
def short(overrides: list[str]) -> list[str]:
    """Runs of one step; the sweep adds their names."""
    return [*overrides, *NARROW, "train.steps=1", "run.name=swept"]


def sweep(words: list[str]) -> int:
    return run_cleanly(lambda: longcat(["train", "-m", *words]))


def recorded(folder: Path) -> list[tuple[str, int | None]]:
    """(name of the run, exit code) of each result in a sweep's folder."""
    return [(Path(result.run).name, result.code) for result in results(folder)]


def test_each_sweep_has_a_folder_of_its_own(short: list[str], tmp_path: Path) -> None:
    """Two sweeps of different names, and one that is started again with more steps."""
    assert sweep([*short, "optim.lr=1e-3,3e-3"]) == 0
    assert sweep([*short, "optim.lr=1e-3,3e-3", "train.steps=2"]) == 0
    assert sweep([*short, "optim.lr=5e-3", "run.name=other"]) == 0
    swept = {path.name: path for path in tmp_path.glob("*-sweep*")}
    assert swept.keys() == {"swept-sweep", "swept-sweep-2", "other-sweep"}
    for name, value in {"swept-sweep": "1", "swept-sweep-2": "2", "other-sweep": "1"}.items():
        written = yaml.safe_load((swept[name] / "multirun.yaml").read_text())
        task = written["hydra"]["overrides"]["task"]
        assert [word for word in task if word.startswith("train.steps=")][-1] == f"train.steps={value}"
    assert recorded(swept["swept-sweep"]) == [("swept-0", 0), ("swept-1", 0)]
    assert len(lines(tmp_path / "swept-1")) == 2, "the second start has resumed the runs of the first"


def test_a_failed_run_is_shown_and_the_others_train(
    short: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sweep([*short, "model.top_k=99,3"]) == 2
    assert [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")] == [
        "error: swept-0: model.top_k=99 exceeds the 6 experts of num_experts+num_zero_experts; lower model.top_k or "
        "add experts"
    ]
    assert recorded(tmp_path / "swept-sweep") == [("swept-0", 2), ("swept-1", 0)]


def test_failures_of_a_launcher_are_shown(short: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """submitit starts each run in a process whose output goes to a log."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs hydra-submitit-launcher")
    words = ["hydra/launcher=submitit_local", f"hydra.launcher.submitit_folder={tmp_path}/logs", "model.top_k=99,3"]
    assert sweep([*short, *words]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and said[0].startswith("error: swept-0: model.top_k=99") and "exit code 2" in said[0]
    assert recorded(tmp_path / "swept-sweep") == [("swept-0", 2), ("swept-1", 0)]
    assert len(lines(tmp_path / "swept-1")) == 1


def test_a_launcher_that_breaks_is_one_line(
    short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As where a cluster kills a job: no traceback, and never code 0."""

    def broken(**options: Any) -> Callable[[Any], Callable[[], None]]:
        def start() -> None:
            raise RuntimeError("job 7 was killed\nand a long log")

        return lambda job: start

    monkeypatch.setattr("hydra.main", broken)
    assert run_sweep([*short, "optim.lr=1e-3,3e-3"]) == 1
    said = capfd.readouterr().err
    assert said == (
        f"error: the launcher ended the sweep: RuntimeError: job 7 was killed; its logs are in {tmp_path}/swept-sweep\n"
    )


WHOLE = {"run": "swept-1", "code": 0, "message": "", "process": "here:1"}
SPOILT = [
    *("", '{"run": "/runs/swept-1", "co', "[]", '{"run": "x"}', "\x00", "[" * 100_000),
    *(json.dumps(WHOLE | part) for part in ({"run": 1}, {"code": "0"}, {"overrides": [1]}, {"stopped_early": "no"})),
]


@pytest.mark.parametrize("text", SPOILT, ids=range(len(SPOILT)))
def test_a_spoilt_result_is_a_failed_run(text: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Every job reads the results of the others before it trains."""
    (tmp_path / "0.json").write_text(json.dumps({"run": "swept-0", "code": 0, "message": "", "process": "here:1"}))
    (tmp_path / "1.json").write_text(text)
    assert [result.code for result in results(tmp_path)] == [0, 1]
    assert report(tmp_path, "") == 1
    said = capfd.readouterr().err
    assert said.startswith("error: 1.json: the result of this run cannot be read (") and said.count("\n") == 1


def test_results_appear_as_a_whole(short: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, plain = {}, Path.replace

    def replace(self: Path, target: Path) -> Path:
        whole[Path(target).name] = json.loads(self.read_text()) if Path(target).suffix == ".json" else None
        return plain(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    assert sweep([*short, "model.top_k=99,98"]) == 2
    assert [whole[name]["code"] for name in ("0.json", "1.json")] == [2, 2]
    assert sorted(path.name for path in (tmp_path / "swept-sweep").glob("*json*")) == ["0.json", "1.json", "sweep.json"]


def test_a_refused_sweep_leaves_no_folder(refused: Refused, tmp_path: Path) -> None:
    words = ["train", "-m", f"run.dir={tmp_path / 'runs'}"]
    refused([*words, "model=debug,huge"], "'model/huge'")
    refused([*words, "optim.lr=fast,1"], "optim.lr=fast")
    refused([*words, "hydra/launcher=nowhere", "optim.lr=1,2"], "launcher/nowhere")
    for values in ("range(0)", "range(0,5,0)", "range(0,inf)"):
        refused([*words, f"train.seed={values}"], f"train.seed={values} has no values, or no end")
    refused([*words, "train.seed=1,2", "hydra.sweeper.max_batch_size=0"], "max_batch_size=0 must be at least 1")
    for given in ("params={optim.lr:1e-3}", "params.optim.lr=1"):
        refused([*words, f"hydra.sweeper.{given}"], "hydra.sweeper.params can be set in a configuration file")
    refused([*words, "optim.lr=interval(1e-4,1e-2)"], "interval(…) is for a search: add hydra/sweeper=optuna")
    search = [*words, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=1"]
    refused([*search, "optim.lr=tag(lgo,interval(1e-4,1e-2))"], "tag(lgo,…) means nothing here")
    refused([*search, "train.seed=tag(log,range(1,5))"], "tag(log,…) means nothing here")
    slurm = ["hydra/launcher=submitit_slurm", "hydra.launcher.additional_parameters.hold=true"]
    refused([*words, *slurm, "optim.lr=1,2"], "write +hydra.launcher.additional_parameters.hold=… to add it")
    assert not (tmp_path / "runs").exists()
    (tmp_path / "file").write_text("mine")
    refused(["train", "-m", f"run.dir={tmp_path / 'file'}", "optim.lr=1,2"], "run.dir=", "choose another run.dir")


def test_a_hopeless_run_ends_early(short: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The second rate trains nothing: its loss at step 2 is above that of the first run."""
    words = ["train.steps=4", "validation.every=2", "pruning.percentile=50", "pruning.min_runs=1"]
    assert sweep([*short, *words, "optim.lr=1e-2,1e-12"]) == 0
    whole, early = results(tmp_path / "swept-sweep")
    assert (whole.reached_end, whole.message) == (True, "done") and len(lines(tmp_path / "swept-0")) == 4
    assert early.stopped_early and early.code == 0 and len(lines(tmp_path / "swept-1")) == 2
    assert early.message.startswith("stopped early at step 2: validation loss ")
    assert early.message in capfd.readouterr().out
    assert (tmp_path / "swept-1" / "checkpoints" / "step-00000002").is_dir()
    assert SWEEP_FOLDER not in os.environ
    assert longcat(["report", str(tmp_path / "swept-sweep")]) == 0
    assert "stopped early, step 2 of 4" in (tmp_path / "swept-sweep" / "report.html").read_text()


def test_unreadable_files_of_other_runs_end_no_run(
    short: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def judge(self: Pruner, step: int, loss: float) -> str:
        raise PermissionError(13, "Permission denied", "runs/other-0")

    monkeypatch.setattr(Pruner, "judge", judge)
    words = ["train", *short, "train.steps=2", "validation.every=1", "pruning.percentile=50"]
    assert run_cleanly(lambda: longcat(words)) == 0
    said = capfd.readouterr().out
    assert said.count("other runs of the sweep cannot be read (Permission denied (runs/other-0)); going on") == 1


@pytest.mark.long
@pytest.mark.parametrize("more", [["run.num_processes=2"], ["hydra/launcher=submitit_local"]])
def test_a_hopeless_run_in_other_processes_ends_early(short: list[str], tmp_path: Path, more: list[str]) -> None:
    """Two ranks, and a launcher's process, into which a sweep that was stopped goes on: there runs start together."""
    words = [*short, "train.steps=4", "validation.every=2", "pruning.percentile=50", "pruning.min_runs=1"]
    if "submitit" in more[0]:
        pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs hydra-submitit-launcher")
        words += ["optim.lr=1e-2,1e-12", "checkpoint.resume=auto"]
        assert sweep(words) == 0
        shutil.rmtree(tmp_path / "swept-1")
        (tmp_path / "swept-sweep" / "1.json").unlink()
        note_finished(tmp_path / "swept-sweep", words, False)
        assert sweep([*words, *more, f"hydra.launcher.submitit_folder={tmp_path}/logs"]) == 0
    else:
        assert sweep([*words, *more, "optim.lr=1e-2,1e-12"]) == 0
    assert not (tmp_path / "swept-sweep-2").exists()
    assert [result.stopped_early for result in results(tmp_path / "swept-sweep")] == [False, True]
    assert [len(lines(tmp_path / f"swept-{number}")) for number in (0, 1)] == [4, 2]


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, int], list[str]]:
    """Runs without training: the exit code of each by its name (0 if it has none), and the names that were started."""
    codes: dict[str, int] = {}
    started: list[str] = []

    def train(tree: Any, overrides: list[str]) -> tuple[int, str]:
        started.append(tree.run.name)
        folder = Path(tree.run.dir) / tree.run.name
        folder.mkdir(exist_ok=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\n")
        code = codes.get(tree.run.name, 0)
        if code < 0:
            raise Interrupted(signal.SIGINT)
        return code, "said"

    monkeypatch.setattr("launch.sweeps.sweep.train", train)
    return codes, started


def test_a_stopped_sweep_goes_on_where_it_was(
    faked: tuple[dict[str, int], list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    codes, started = faked
    words = ["train", "-m", f"run.dir={tmp_path}", "run.name=swept", "optim.lr=1,2,3,4"]
    codes |= {"swept-1": 1, "swept-2": 3}
    assert longcat(words) == 1
    assert started == ["swept-0", "swept-1", "swept-2"], "a stopped run ends the sweep"
    started.clear()
    codes.clear()
    assert longcat([*words, "hydra/launcher=basic"]) == 0
    assert started == ["swept-1", "swept-2", "swept-3"], "a run that ended with 0 is not started again"
    assert "going on, 1 of its runs done" in capfd.readouterr().err
    assert recorded(tmp_path / "swept-sweep") == [(f"swept-{number}", 0) for number in range(4)]
    assert not (tmp_path / "swept-sweep-2").exists()
    assert longcat(words) == 0
    assert len(recorded(tmp_path / "swept-sweep-2")) == 4, "a finished sweep gets the next number"


def test_a_killed_sweep_goes_on_and_another_gets_a_number(
    faked: tuple[dict[str, int], list[str]], tmp_path: Path
) -> None:
    codes, started = faked
    words = ["train", "-m", f"run.dir={tmp_path}", "run.name=swept"]
    codes["swept-1"] = -1
    assert longcat([*words, "optim.lr=1,2,3"]) == 3
    assert recorded(tmp_path / "swept-sweep") == [("swept-0", 0), ("swept-1", None)]
    codes.clear()
    assert longcat([*words, "optim.lr=1,2"]) == 0
    assert len(recorded(tmp_path / "swept-sweep-2")) == 2
    started.clear()
    assert longcat([*words, "optim.lr=1,2,3"]) == 0
    assert started == ["swept-1", "swept-2"] and len(recorded(tmp_path / "swept-sweep")) == 3


def test_two_starts_of_a_sweep_at_once(
    faked: tuple[dict[str, int], list[str]], refused: Refused, tmp_path: Path
) -> None:
    codes, _ = faked
    words = ["train", "-m", f"run.dir={tmp_path}", "run.name=swept", "optim.lr=1,2"]
    codes["swept-0"] = 3
    assert longcat(words) == 3
    with lock(tmp_path / "swept-sweep"):
        refused(words, "is in use by a running training")


def test_a_run_that_still_trains_is_not_started_again(
    faked: tuple[dict[str, int], list[str]], refused: Refused, tmp_path: Path
) -> None:
    """Jobs of a launcher go on after Ctrl-C of the command that submitted them."""
    codes, started = faked
    words = ["train", "-m", f"run.dir={tmp_path}", "run.name=swept", "optim.lr=1,2"]
    codes["swept-1"] = -1
    assert longcat(words) == 3
    started.clear()
    with lock(tmp_path / "swept-1"):
        refused(words, f"run 1 of {tmp_path}/swept-sweep still trains, in {tmp_path}/swept-1")
    assert not started and recorded(tmp_path / "swept-sweep") == [("swept-0", 0), ("swept-1", None)]


def test_a_refused_start_forgets_nothing(
    faked: tuple[dict[str, int], list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, started = faked
    words = ["train", "-m", f"run.dir={tmp_path}", "run.name=swept", "optim.lr=1,2"]
    codes |= {"swept-0": 1, "swept-1": 1}
    assert longcat(words) == 1

    def refusing(**options: Any) -> None:
        raise HydraException("no such launcher")

    with monkeypatch.context() as patched:
        patched.setattr("hydra.main", refusing)
        assert longcat(words) == 2
    assert recorded(tmp_path / "swept-sweep") == [("swept-0", 1), ("swept-1", 1)]
    assert (tmp_path / "swept-sweep" / SWEEP).is_file()
    codes.clear()
    started.clear()
    assert longcat(words) == 0
    assert started == ["swept-0", "swept-1"] and not (tmp_path / "swept-sweep-2").exists()


def test_a_gap_in_the_numbers_hides_no_sweep(faked: tuple[dict[str, int], list[str]], tmp_path: Path) -> None:
    codes, started = faked
    words = ["train", "-m", f"run.dir={tmp_path}", "run.name=swept"]
    assert longcat([*words, "optim.lr=1"]) == 0
    codes["swept-1"] = 1
    assert longcat([*words, "optim.lr=1,2"]) == 1
    shutil.rmtree(tmp_path / "swept-sweep")
    codes.clear()
    started.clear()
    assert longcat([*words, "optim.lr=1,2"]) == 0
    assert started == ["swept-1"], "it goes on in swept-sweep-2"
    assert longcat([*words, "optim.lr=1"]) == 0
    assert {path.name for path in tmp_path.glob("*-sweep*")} == {"swept-sweep-2", "swept-sweep-3"}


def test_other_values_than_before_train_in_a_new_folder(
    faked: tuple[dict[str, int], list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A sweeper that draws its values has drawn others for the same number in an earlier start."""
    _, started = faked
    words = ["train", "-m", f"run.dir={tmp_path}", "run.name=swept", "optim.lr=1,2"]
    assert longcat(words) == 0
    folder = tmp_path / "swept-sweep"
    drawn = Result(str(tmp_path / "swept-1"), 0, "done", "", [words[2], "optim.lr=7"])
    for expected in (["swept-1-2"], []):
        write_result(folder, 1, drawn)
        note_finished(folder, words[2:], False)
        started.clear()
        assert longcat(words) == 0
        assert started == expected
        drawn = results(folder)[1]
        assert (drawn.run, drawn.overrides) == (str(tmp_path / "swept-1-2"), [words[2], "optim.lr=2"])
    said = capfd.readouterr().err
    assert said.count("note: ") == 1 and "swept-1 had optim.lr=7 in an earlier start and has optim.lr=2 now: " in said


def test_a_run_without_an_end_has_failed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_result(tmp_path, 0, Result("runs/swept-0", None, "", "here:1"))
    assert report(tmp_path, "") == 1
    assert capfd.readouterr().err == "error: swept-0: has not ended (exit code 1)\n"


def test_runs_beside_the_sweep_come_before_those_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("here", "there"):
        (tmp_path / place / "runs" / "swept-0").mkdir(parents=True)
    sweep = tmp_path / "there" / "runs" / "swept-sweep"
    sweep.mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = Result("runs/swept-0", 0, "", "")
    assert result.folder(sweep) == tmp_path / "there" / "runs" / "swept-0"
    monkeypatch.chdir(sweep)
    assert result.folder(Path()) == tmp_path / "there" / "runs" / "swept-0"
    assert Result("elsewhere/swept-1", 0, "", "").folder(sweep) == Path("elsewhere/swept-1")


def test_nodes_do_not_each_run_a_sweep(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "-m", f"run.dir={tmp_path / 'runs'}", "optim.lr=1,2"]
    refused([*words, "launch.nodes=2", "launch.rendezvous=a:1"], "on one node")
    for name, value in {"NODEID": "1", "STEP_NUM_NODES": "2", "STEP_NUM_TASKS": "2"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    refused(words, "a sweep trains each run on one node", "hydra/launcher=submitit_slurm")
    assert not (tmp_path / "runs").exists()
