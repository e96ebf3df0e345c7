"""Bad input: exit code 2 and one line that says what is wrong, where, and what to do; nothing is overwritten."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main as longcat
from tests.support.fixtures import Refused, error_line
from tests.support.running import NARROW, contents, exit_json, finish, program, train_here
from train.__main__ import main as rank_main
from train.checkpoint.files import file_hash
from train.checkpoint.manifest import MANIFEST, STATE, list_checkpoints
from train.run_dir.folder import lock

CONFIGURATION = {
    # unknown keys, with the nearest one
    "typo-in-model": (["model.hidden_sise=64"], ["unknown key 'model.hidden_sise'", "'model.hidden_size'"]),
    "typo-in-train": (["train.stpes=5"], ["unknown key 'train.stpes'", "'train.steps'"]),
    "typo-in-balance": (["balance.kii=0.1"], ["unknown key 'balance.kii'", "'balance.ki'"]),
    "typo-in-section": (["trian.steps=5"], ["unknown key 'trian.steps'", "'train.steps'"]),
    "typo-in-group": (["modle=debug"], ["unknown key 'modle'", "'model'"]),
    "unknown-section": (["teleport.speed=1"], ["unknown key 'teleport.speed'", "nearest"]),
    "added-key": (["+train.warp=1"], ["unknown key 'train.warp'", "nearest"]),
    "indexed-key": (["data.paths[0]=x"], ["unknown key 'data.paths[0]'", "'data.paths'"]),
    "no-equals-sign": (["train.steps"], ["'train.steps' is no override", "write key=value"]),
    "flag": (["--steps"], ["'--steps' is no override", "write key=value"]),
    # unknown keys of a mapping that is given as a value
    "typo-in-mapping": (["optim={lrr: 1}"], ["unknown key 'optim.lrr'; the nearest is 'optim.lr'"]),
    "typo-in-inner-mapping": (["model.rope_scaling={facter: 4}"], ["the nearest is 'model.rope_scaling.factor'"]),
    "typo-in-stage": (
        ["data.stages=[{start_tokens: 512, sequence_lenght: 64}]"],
        ["unknown key 'sequence_lenght' in data.stages; the nearest is 'sequence_length'"],
    ),
    "typo-inside-a-stage": (
        ["data.stages=[{start_tokens: 5, rope_scaling: {facter: 2}}]"],
        ["unknown key 'rope_scaling.facter' in data.stages; the nearest is 'rope_scaling.factor'"],
    ),
    "stage-without-start": (["data.stages=[{}]"], ["data.stages[0].start_tokens is missing"]),
    # wrong types
    "text-for-int": (["train.steps=many"], ["train.steps=many", "Integer", "default of train.steps is 1000"]),
    "fraction-for-int": (["train.steps=1.5"], ["train.steps=1.5", "Integer", "default"]),
    "null-for-int": (["train.steps=null"], ["train.steps=null", "not Optional", "default"]),
    "unknown-choice": (
        ["parallel.schedule=gpipe"],
        ["parallel.schedule=gpipe is not known; use zbv, 1f1b, interleaved or dualpipev"],
    ),
    "text-for-float": (["optim.lr=fast"], ["optim.lr=fast", "Float", "default of optim.lr is 0.001"]),
    "list-for-float": (["loss.mtp_weight=[1]"], ["loss.mtp_weight=[1]", "Float", "default"]),
    "text-for-bool": (["train.deterministic=maybe"], ["train.deterministic=maybe", "bool", "default"]),
    "float-for-list": (["optim.betas=0.9"], ["optim.betas=0.9", "list", "default of optim.betas is [0.9, 0.95]"]),
    "text-in-list": (["data.weights=[x]"], ["data.weights=[x]", "Float", "default"]),
    "value-for-section": (["train=5"], ["train=5", "train is a section: set its keys"]),
    "unclosed-list": (["data.weights=[1"], ["data.weights=[1", "input"]),
    "sweep-without-m": (["train.steps=1,2"], ["train.steps=1,2", "--multirun"]),
    # values that are no choice
    "dtype": (["train.dtype=float16"], ["train.dtype=float16", "use bfloat16, float32 or auto"]),
    "wandb": (["logging.wandb=yes"], ["logging.wandb=yes", "use offline, online or disabled"]),
    "method": (["balance.method=pdi"], ["balance.method=pdi", "use pid, sign or quantile"]),
    "schedule": (["schedule=linear"], ["'schedule/linear'", "use constant, cosine, wsd"]),
    "preset": (["model=huge"], ["'model/huge'", "use debug, ", "tiny"]),
    "data": (["data=web"], ["'data/web'", "python_source"]),
    "experiment": (["experiment=nothing"], ["'experiment/nothing'", "quickstart"]),
    "empty-choice": (["model="], ["'model=' names no choice", "configs/model"]),
    "null-choice": (["model=null"], ["'model=null' names no choice", "configs/model"]),
    # impossible sizes
    "top_k": (["model.top_k=25"], ["model.top_k=25", "24 experts", "lower model.top_k"]),
    "budget-above-k": (["model.expected_ffn_experts=7"], ["model.expected_ffn_experts=7", "at most model.top_k=6"]),
    "budget-without-identity": (["model.num_zero_experts=0"], ["num_zero_experts=0", "set it to model.top_k=6"]),
    "odd-rope": (["model.qk_rope_head_dim=15"], ["model.qk_rope_head_dim=15", "must be even"]),
    "no-heads": (["model.num_heads=0"], ["model.num_heads=0", "must be above 0"]),
    "negative-width": (["model.hidden_size=-8"], ["model.hidden_size=-8", "must be above 0"]),
    "negative-identity": (["model.num_zero_experts=-1"], ["model.num_zero_experts=-1", "must not be negative"]),
    "groups": (["balance.num_groups=3"], ["balance.num_groups=3", "model.num_experts=16", "use a divisor"]),
    "batch": (["train.micro_batch_size=3"], ["train.micro_batch_size=3", "batch_size=8", "change either"]),
    "no-steps": (["train.steps=0"], ["train.steps=0", "at least 1"]),
    "one-token": (["train.sequence_length=1"], ["train.sequence_length=1", "at least 2"]),
    "nan": (["optim.eps=nan"], ["optim.eps=nan", "must be a finite number"]),
    "infinite-rate": (["optim.lr=inf"], ["optim.lr=inf", "must be a finite number"]),
    "negative-every": (["checkpoint.every=-1"], ["checkpoint.every=-1", "must not be negative"]),
    "cosine-without-length": (["schedule=cosine", "schedule.decay_steps=0"], ["needs schedule.decay_steps"]),
    "decay-without-length": (["schedule.decay_start=200"], ["schedule.decay_start=200", "needs schedule.decay_steps"]),
    "name-with-slash": (["run.name=a/b"], ["run.name='a/b'", "one folder name"]),
    "name-of-parent": (["run.name=.."], ["run.name='..'", "one folder name"]),
    "resume-empty": (["checkpoint.resume="], ["checkpoint.resume is empty", "auto, never or a checkpoint's folder"]),
    # impossible layouts
    "two-left-over": (["parallel.dp=-1"], ["parallel.dp and parallel.fsdp are both -1", "only one"]),
    "mesh": (["parallel.dp=3", "run.num_processes=4"], ["parallel.dp", "4 ranks", "set one axis to -1, or start 3"]),
    "micro-batches": (["run.num_processes=3"], ["8 micro-batches", "3 data-parallel ranks", "a multiple of 3"]),
    "processes": (["run.num_processes=0"], ["run.num_processes=0", "at least 1"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGURATION)
def test_wrong_configuration_is_refused_before_any_write(
    case: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, fragments = CONFIGURATION[case]
    monkeypatch.setattr("train.process.rank.main", lambda config: 0)  # not refused: it must fail before it trains
    refused(["train", f"run.dir={tmp_path / 'runs'}", *words], *fragments)
    assert not (tmp_path / "runs").exists()


# ------------------------------------------------------------------------------------------------ the run folder


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """Overrides and folder of a run of two steps with a checkpoint of each."""
    out = tmp_path_factory.mktemp("trained")
    words = ["model=debug", "model.vocab_size=512", "model.hidden_size=32", *NARROW, f"data.paths=[{corpus}]"]
    words += ["train.sequence_length=32", "train.global_batch_size=2", "train.micro_batch_size=2", "checkpoint.every=1"]
    words += ["validation.every=0", "validation.documents=0", "logging.wandb=disabled", "run.name=used"]
    assert train_here([*words, "train.steps=2", f"run.dir={out}"]) == 0
    return words, out / "used"


@pytest.fixture
def used(trained: tuple[list[str], Path], tmp_path: Path) -> tuple[list[str], Path]:
    """A copy of that run that a test may damage: the overrides that resume it, and its folder."""
    words, folder = trained
    shutil.copytree(folder, tmp_path / "used")
    return ["train", *words, "train.steps=4", f"run.dir={tmp_path}"], tmp_path / "used"


def damage(checkpoint: Path) -> None:
    path = next(checkpoint.glob("*.distcp"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "words,fragments",
    [
        (["model.hidden_size=48"], ["model.hidden_size was 32 and is now 48", "choose another run.name"]),
        (["optim.lr=3e-3", "train.seed=5"], ["optim.lr was 0.001 and is now 0.003", "train.seed was 0"]),
        (["train.global_batch_size=4"], ["train.global_batch_size was 2 and is now 4", "another configuration"]),
        (["checkpoint.resume=never"], ["checkpoint.resume=never would overwrite", "choose another run.name"]),
        (["train.steps=two"], ["train.steps=two"]),
        (["parallel.dp=2"], ["parallel.dp"]),
    ],
    ids=["other-model", "other-rate-and-seed", "other-batch", "never", "wrong-type", "wrong-layout"],
)
def test_folder_of_another_run_is_left_alone(
    words: list[str], fragments: list[str], used: tuple[list[str], Path], refused: Refused
) -> None:
    before = contents(used[1])
    refused([*used[0], *words], *fragments)
    assert contents(used[1]) == before


def test_folder_in_use_is_left_alone(used: tuple[list[str], Path], refused: Refused) -> None:
    before = contents(used[1])
    with lock(used[1]):
        refused(used[0], str(used[1]), "in use by a running training", "choose another run.name")
    assert contents(used[1]) == before


def test_an_unreadable_configuration_is_refused(used: tuple[list[str], Path], refused: Refused) -> None:
    for content in (b"{: [", b"\xff\xfe\x00", b"just text"):
        (used[1] / "config.yaml").write_bytes(content)
        before = contents(used[1])
        refused(used[0], "config.yaml", "choose another run.name")
        assert contents(used[1]) == before


def test_an_unwritable_folder_is_refused(overrides: list[str], refused: Refused, tmp_path: Path) -> None:
    """Below a regular file, where root cannot write either."""
    (tmp_path / "file").write_text("mine")
    words = [*overrides, f"run.dir={tmp_path / 'file' / 'runs'}"]
    refused(["train", *words], "run.dir=", "cannot write in", "choose another run.dir")
    assert (tmp_path / "file").read_text() == "mine"


def test_resume_is_refused_when_no_checkpoint_is_valid(used: tuple[list[str], Path], refused: Refused) -> None:
    for path in list_checkpoints(used[1] / "checkpoints"):
        damage(path)
    before = contents(used[1])
    refused(used[0], "no checkpoint in", "step-00000002", "does not have the hash", "another run.name")
    after = contents(used[1])
    assert exit_json(used[1])["code"] == 2
    assert before.pop("exit.json") != after.pop("exit.json")
    assert after == before


STATES: dict[str, tuple[dict[str, Any], str]] = {
    "no-configuration": ({"configuration": None}, "state.json has no configuration"),
    "no-model": ({"configuration": {"data": {}, "train": {}}}, "state.json has a configuration without model"),
    "model-is-a-number": ({"configuration": {"model": 5}}, "state.json has a configuration without model"),
    "no-data": ({"configuration": {"model": {}, "train": {}}}, "state.json has a configuration without data"),
    "no-step": ({"counters": [1]}, "state.json does not say the step and the configuration"),
    "only-the-step": ({"counters": {"step": 2}}, "state.json does not say counters.samples (it is missing)"),
    "endless-step": ({"counters": {"step": math.inf}}, "state.json does not say counters.step (it is inf)"),
    "negative-tokens": (
        {"counters": {"step": 2, "samples": 8, "tokens": -1}},
        "state.json does not say counters.tokens (it is -1)",
    ),
    "health-is-a-list": ({"health": [1]}, "state.json has no state of the health checks"),
}


@pytest.mark.parametrize("case", STATES)
def test_state_of_another_program_is_refused(
    case: str, used: tuple[list[str], Path], refused: Refused, tmp_path: Path
) -> None:
    """Its hashes are right: another version or a tool wrote it."""
    changes, part = STATES[case]
    for path in list_checkpoints(used[1] / "checkpoints"):
        state, manifest = (json.loads((path / name).read_text()) for name in (STATE, MANIFEST))
        (path / STATE).write_text(json.dumps(state | changes))
        manifest["files"][STATE] = file_hash(path / STATE)
        (path / MANIFEST).write_text(json.dumps(manifest))
    refused(used[0], "no checkpoint in", part)
    for verb in ("export", "grow", "merge"):
        refused([verb, f"source={used[1]}", f"target={tmp_path / 'target'}"], part)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "where,words,fragments",
    [
        ("nowhere", [], ["nowhere is no folder", "use auto, never or a checkpoint's folder"]),
        ("used", [], ["no checkpoint in", "step-00000002", "restore one"]),
        ("used/checkpoints/step-00000001", [], ["step-00000001 is not a valid checkpoint", "hash", "name another"]),
        ("empty", [], ["empty is not a valid checkpoint: no readable manifest.json", "name another"]),
        (
            "valid",
            ["model.hidden_size=48"],
            ["another model", "model.hidden_size was 32 and is now 48", "equal"],
        ),
    ],
    ids=["missing", "run-of-broken-ones", "broken", "not-a-checkpoint", "other-model"],
)
def test_wrong_resume_path_is_refused(
    where: str,
    words: list[str],
    fragments: list[str],
    used: tuple[list[str], Path],
    trained: tuple[list[str], Path],
    refused: Refused,
    tmp_path: Path,
) -> None:
    for path in list_checkpoints(used[1] / "checkpoints"):
        damage(path)
    (tmp_path / "empty").mkdir()
    source = trained[1] if where == "valid" else tmp_path / where
    refused([*used[0], "run.name=new", f"checkpoint.resume={source}", *words], *fragments)
    assert list_checkpoints(tmp_path / "new" / "checkpoints") == []


# ------------------------------------------------------------------------------------------------ other commands


OTHER_VERBS = {
    "no-verb": ([], ["no verb given", "train", "--help"]),
    "unknown-verb": (["fly"], ["unknown verb 'fly'", "train"]),
    "report-of-nothing": (["report"], ["needs a run folder", "runs/quickstart"]),
    "report-of-no-run": (["report", "{tmp}"], ["is no run", "give runs/<name>"]),
    "report-of-no-folder": (["report", "{tmp}/nothing"], ["nothing is no folder", "give the folder of a run"]),
    "checkpoint-of-nothing": (["checkpoint"], ["longcat checkpoint list DIR"]),
    "checkpoint-of-no-run": (["checkpoint", "list", "{tmp}"], ["has no checkpoint", "give a run folder"]),
    "checkpoint-of-no-folder": (["checkpoint", "list", "{tmp}/step-00000100"], ["has no checkpoint", "step-"]),
    "data-without-build": (["data"], ["longcat data build"]),
    "data-of-nothing": (["data", "build", "data.source={tmp}/no", "data.out={tmp}/out"], ["data.source", "no"]),
    "data-with-typo": (["data", "build", "data.text_filed=x"], ["'data.text_filed'", "'data.text_field'"]),
    "counts-with-typo": (["counts", "model.hidden_sise=4"], ["'model.hidden_size'"]),
    "sweep-with-typo": (["train", "-m", "train.stpes=1,2"], ["'train.stpes'", "'train.steps'"]),
    "sweep-over-a-wrong-choice": (["train", "-m", "model=debug,huge"], ["'model/huge'", "tiny"]),
    "sweep-with-wrong-type": (["train", "-m", "train.steps=x"], ["train.steps=x", "default"]),
    "sweep-with-flag": (["train", "-m", "--steps"], ["'--steps' is no override", "write key=value"]),
    "sweep-with-wrong-size": (
        ["train", "-m", "train.steps=0", "run.dir={tmp}"],
        ["default-0: train.steps=0", "least 1"],
    ),
}


@pytest.mark.parametrize("case", OTHER_VERBS)
def test_other_commands_refuse_in_one_line(
    case: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, fragments = OTHER_VERBS[case]
    monkeypatch.chdir(tmp_path)
    refused([word.format(tmp=tmp_path) for word in words], *fragments)


def test_report_that_cannot_be_written_is_refused(
    used: tuple[list[str], Path], refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = used[1] / "report.html"
    page.unlink(missing_ok=True)
    page.mkdir()
    before = sorted(used[1].iterdir())
    refused(["report", str(used[1])], str(page), "Is a directory", "choose another folder")
    page.rmdir()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("train.checkpoint.files.os.fsync", full)
    refused(["report", str(used[1])], str(page), "No space left on device", "free space")
    assert sorted({*used[1].iterdir(), page}) == before


def test_a_current_folder_that_is_gone_is_refused(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    refused(["counts", "model=debug"], "the current folder has been removed", "change to one that exists")
    monkeypatch.chdir(tmp_path)


def test_verify_names_what_is_damaged(
    used: tuple[list[str], Path], refused: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    assert longcat(["checkpoint", "verify", str(used[1])]) == 0
    assert capfd.readouterr().out.count("  valid\n") == 2
    damage(list_checkpoints(used[1] / "checkpoints")[1])
    refused(["checkpoint", "verify", str(used[1])], "1 of 2 checkpoints", str(used[1]), "restore")
    refused(["checkpoint", "verify", str(used[1] / "checkpoints" / "step-00000002")], "1 of 1 checkpoints")
    assert longcat(["checkpoint", "verify", str(used[1] / "checkpoints" / "step-00000001")]) == 0


# ------------------------------------------------------------------------------------------------ as programs


def test_the_program_refuses_in_one_line(tmp_path: Path) -> None:
    code, errors = finish(program("launch", "train", "train.stpes=3", f"run.dir={tmp_path / 'runs'}"))
    assert code == 2
    assert errors == error_line(errors, "'train.steps'") + "\n"
    assert not (tmp_path / "runs").exists()


def test_single_rank_refuses_in_one_line(used: tuple[list[str], Path]) -> None:
    """`python -m train`, on a folder that holds the exit.json of the run before."""
    before = contents(used[1])
    code, errors = finish(program(*used[0], "optim.lr=0.5"))
    assert code == 2
    assert errors == error_line(errors, "optim.lr was 0.001 and is now 0.5") + "\n"
    assert contents(used[1]) == before


def test_exit_json_holds_the_code_under_torchrun(overrides: list[str], tmp_path: Path) -> None:
    """torchrun turns every failure into code 1; one rank prints the error."""
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "train"]
    code, errors = finish(program(*launcher, *overrides, "train.stpes=3"))
    assert code == 1
    said = error_line(errors, "'train.steps'")
    assert exit_json(tmp_path / "run") == {"code": 2, "message": said.removeprefix("error: ")}


@pytest.fixture
def as_a_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment that an agent sets for the first of two ranks."""
    agent = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in agent.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("as_a_rank")
def test_refused_rank_writes_exit_json(overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert rank_main([*overrides, "train.global_batch_size=2"]) == 2
    said = error_line(capfd.readouterr().err, "1 micro-batches", "2 data-parallel ranks")
    assert exit_json(tmp_path / "run") == {"code": 2, "message": said.removeprefix("error: ")}
    assert rank_main([*overrides, "parallel.fsdp=3"]) == 2
    said = error_line(capfd.readouterr().err, "parallel.fsdp", "2 ranks")
    assert exit_json(tmp_path / "run")["message"] == said.removeprefix("error: "), "exit.json is from an older refusal"


@pytest.mark.usefixtures("as_a_rank")
def test_refused_rank_leaves_other_runs_alone(used: tuple[list[str], Path], capfd: pytest.CaptureFixture[str]) -> None:
    before = contents(used[1])
    for words, fragments in ((["optim.lr=0.5"], "is now 0.5"), (["train.stpes=3", "run.name=used"], "'train.steps'")):
        assert rank_main([*used[0][1:], "train.global_batch_size=4", *words]) == 2
        error_line(capfd.readouterr().err, fragments)
        assert contents(used[1]) == before
    (used[1] / "config.yaml").unlink()  # as in a run that has just started
    with lock(used[1]):
        before = contents(used[1])
        assert rank_main([*used[0][1:], "train.stpes=3"]) == 2
        assert contents(used[1]) == before


def test_openmp_may_not_change_its_threads(
    overrides: list[str], refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_DYNAMIC", "true")
    refused(["train", *overrides], "OMP_DYNAMIC=true", "unset it")
