"""Numbers and choices that no run can work with are refused in one line, before anything is allocated or written."""

from __future__ import annotations

from pathlib import Path

import pytest

from parallel.capacity import host_memory, needs
from parallel.layout import BatchShape
from parallel.mesh import MeshSizes
from tests.support.fixtures import Refused
from train.compose import compose

LIMITS = {
    # numbers that overflow a type of torch or of the operating system
    "timeout-1e300": (["parallel.timeout_seconds=1e300"], ["parallel.timeout_seconds=1e+300", "at most"]),
    "timeout-1e15": (["parallel.timeout_seconds=1e15"], ["timeout_seconds=1000000000000000.0", "at most 100000000.0"]),
    "timeout-of-no-time": (["parallel.timeout_seconds=1e-9"], ["must be at least 1 second"]),
    "vocabulary-1e14": (["model.vocab_size=1e14"], ["model.vocab_size=1e14", "Integer", "default"]),
    "vocabulary-in-digits": (["model.vocab_size=100000000000000"], ["model.vocab_size=1", "at most 2147483647"]),
    "batch-1e11": (["train.global_batch_size=100000000000"], ["global_batch_size=1", "at most 2147483647"]),
    "more-than-64-bits": (["train.seed=99999999999999999999"], ["train.seed", "more than 64 bits"]),
    "minus-64-bits": (["train.seed=-99999999999999999999"], ["train.seed", "more than 64 bits"]),
    "thousands-of-digits": (["train.steps=" + "1" * 5000], ["train.steps", "5000 digits is too long"]),
    "tokens-of-a-run": (["train.steps=9000000000000000000"], ["more tokens than 64 bits count", "lower train.steps"]),
    "chunks": (["overlap.num_chunks=1000000000"], ["overlap.num_chunks=1000000000", "at most 1024"]),
    "layers": (["model.num_layers=1000000"], ["model.num_layers=1000000", "at most 4096"]),
    "processes": (["run.num_processes=1000000"], ["run.num_processes=1000000", "at most 4096"]),
    "length": (["train.sequence_length=1000000000"], ["train.sequence_length=1", "at most 16777216"]),
    # floats that float32 cannot hold
    "eps-is-0": (["optim.eps=1e-46"], ["optim.eps=1e-46 is 0 in float32", "at least 1.18e-38"]),
    "norm-eps-is-0": (["model.rms_norm_eps=1e-50"], ["model.rms_norm_eps=1e-50 is 0 in float32"]),
    "std-is-0": (["model.hidden_std=1e-60"], ["model.hidden_std=1e-60 is 0 in float32"]),
    "rate-is-0": (["optim.lr=1e-45"], ["optim.lr=1e-45 is 0 in float32"]),
    "rate-of-a-role-is-0": (["optim.lr_scale.head=1e-45"], ["optim.lr_scale.head=1e-45 is 0 in float32"]),
    "in-a-list": (["optim.betas=[1e-46,0.5]"], ["optim.betas=1e-46 is 0 in float32"]),
    "nan-in-a-list": (["optim.betas=[nan,0.5]"], ["optim.betas=nan must be a finite number"]),
    "theta-is-infinite": (["model.rope_theta=1e39"], ["model.rope_theta=1e+39 is infinite in float32"]),
    "theta-below-1": (["model.rope_theta=1e-9"], ["model.rope_theta=1e-09", "at least 1"]),
    # sizes that do not fit each other
    "mtp-beyond-the-sequence": (
        ["train.sequence_length=2", "model.num_mtp_layers=2"],
        ["model.num_mtp_layers=2", "train.sequence_length=2", "lower it"],
    ),
    # memory, by formula
    "560B": (["model=flash"], ["model=flash", "would need at least", "TiB", "use a smaller model"]),
    "a-vocabulary": (["model.vocab_size=2000000000"], ["model=tiny", "TiB", "use a smaller model"]),
    "a-batch": (["train.global_batch_size=2000000000"], ["would need at least", "smaller model or batch"]),
    "ranks": (
        ["run.num_processes=4096", "train.global_batch_size=4096", "parallel.fsdp=256", "parallel.dp=16"],
        ["4096 ranks on it would need at least"],
    ),
    "experts": (
        ["run.num_processes=4096", "train.global_batch_size=4096"],
        ["16 experts of a rank's group would be sharded over 4096 ranks", "use parallel.fsdp=256 and parallel.dp=16"],
    ),
    # lists whose items have another type
    "mapping-for-weight": (["data.weights=[{a: 1}]"], ["data.weights=", "each item must be a number"]),
    "list-for-beta": (["optim.betas=[[1],0.5]"], ["optim.betas=", "each item must be a number"]),
    "mapping-for-path": (["data.paths=[{a: 1}]"], ["DataConfig", "not dict"]),
    "weight-of-a-stage": (["data.stages=[{start_tokens: 5, weights: [[1]]}]"], ["data.stages", "number"]),
    # groups and Hydra's own settings
    "two-models": (["model=[debug,tiny]"], ["'model=[debug,tiny]' names several choices", "one file"]),
    "two-schedules": (["schedule=[wsd,cosine]"], ["names several choices"]),
    "no-data": (["data=null"], ["'data=null' names no choice"]),
    "hydra-null": (["hydra=null"], ["'hydra=null'", "fixed", "leave it out"]),
    "hydra-folder": (["hydra.run.dir=elsewhere"], ["'hydra.run.dir=elsewhere'", "fixed"]),
    "launcher-of-one-run": (["hydra/launcher=basic"], ["says how a sweep runs", "add -m"]),
    "search-path-nowhere": (["hydra.searchpath=[nowhere]"], ["nowhere is not available"]),
    "deleted-key": (["~train.steps"], ["'~train.steps' takes a key away", "set it to another value"]),
    "deleted-group": (["~model"], ["'~model' takes a key away"]),
    "package": (["model@x=debug"], ["unknown key 'model@x'", "'model'"]),
    "circle": (["train.steps=${train.steps}"], ["ecursive", "train.steps"]),
    "not-utf-8": (["run.name=a\udcff"], ["is not valid UTF-8"]),
    "sweep-hydra-null": (["-m", "hydra=null"], ["'hydra=null'", "fixed"]),
    "sweep-own-folder": (["-m", "hydra.sweep.dir=x", "model=debug,tiny"], ["'hydra.sweep.dir=x'", "fixed"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LIMITS)
def test_what_cannot_work_is_refused_before_any_write(
    case: str, refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, fragments = LIMITS[case]
    monkeypatch.setattr("train.process.rank.main", lambda config: 0)  # not refused: it must fail before it trains
    monkeypatch.setattr("launch.this_machine.run_here", lambda *arguments: 0)
    refused(["train", f"run.dir={tmp_path / 'runs'}", *words], *fragments)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("words", [["model=small"], ["optim.eps=1e-37"], ["train.seed=-5"], ["model.num_layers=4096"]])
def test_what_is_within_the_limits_composes(words: list[str]) -> None:
    compose(words)


def test_names_are_taken_as_they_are_written() -> None:
    """Characters that Hydra's grammar takes only in quotes."""
    config = compose(["run.name=lr=3e-3", "data.out=~/Prüfung", "data.paths=[daten/ü,a b#c/corpus]"])
    assert (config.run.name, Path(config.data.out).name) == ("lr=3e-3", "Prüfung")
    assert config.data.paths == ["daten/ü", "a b#c/corpus"]


def test_memory_of_the_machine_is_between_bounds() -> None:
    assert 2**28 < host_memory() < 2**60


LONG = "n" * 300


@pytest.mark.parametrize(
    "words",
    [
        ["train", f"data.paths=[{LONG}]"],
        ["train", f"checkpoint.resume={LONG}"],
        ["train", f"run.name={LONG}"],
        ["check", f"data.paths=[{LONG}]"],
        ["data", "build", f"data.out={LONG}"],
        ["data", "build", f"data.tokenizer={LONG}"],
        ["data", "build", f"data.source={LONG}", "data.out=out"],
        ["export", f"source={LONG}", "target=out"],
        ["train", "--config-dir", LONG],
    ],
    ids=lambda words: " ".join(words).replace(LONG, "LONG"),
)
def test_names_that_are_too_long_are_one_line(
    words: list[str], overrides: list[str], refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused([words[0], *(overrides if words[0] in ("train", "check") else []), *words[1:]], LONG[:200])


def test_unknown_home_is_a_name_like_others(refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused(["data", "build", "data.source='~$notes.txt'", "data.out=out"], "~$notes.txt")


def test_offload_leaves_the_memory_of_the_gpu_free() -> None:
    config = compose(["model=flash_half", "parallel.sharding=zero3", "parallel.offload=cpu"])
    batch = BatchShape(1, 1, 256)
    (gpu,) = needs(config.model, config.parallel, MeshSizes(1, 1, 1, 1, 1, 1), batch, on_gpu=True)
    (host,) = needs(config.model, config.parallel, MeshSizes(1, 1, 1, 1, 1, 1), batch, on_gpu=False)
    assert gpu.state == 0
    assert host.state > 2**40
