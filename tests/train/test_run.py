"""A run from end to end: exact resumption, repeatability, and what its folder holds."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import yaml

from tests.support.running import (
    NARROW,
    exact,
    exit_json,
    finish,
    lines,
    program,
    train_here,
    train_two,
    uninterrupted,
    wait_for_step,
)
from train.checkpoint.files import HASH
from train.checkpoint.manifest import list_checkpoints, verify
from train.process.start_clock import PARTS as START_PARTS
from train.process.start_clock import PREFIX as START

METRICS = {
    "step", "first_sample", "tokens", "loss", "loss_mtp", "loss_balance", "loss_z", "grad_norm", "lr", "step_seconds",
    "tokens_per_second", "mfu", "ffn_experts_per_token", "expert_load_max_over_mean", "bias_range",
    "router_similarity", "router_grad_ratio", "hidden_norm", "exposed_comm_share", "memory_gib", "state_hash", HASH,
    "memory_rank", "flops", "slowest_rank", "slowest_rank_ratio",
    "loss_deviation", "grad_norm_deviation", "hidden_norm_growth", "dead_experts", "grad_rms_over_eps",
}  # fmt: skip
NEED_A_WINDOW = {"loss_deviation", "grad_norm_deviation", "hidden_norm_growth"}
PARTS = {"layer_0", "embedding", "head", "mtp"}
BY_LAYER = {
    f"{key}/layer_0" for key in ("bias_range", "expert_load_max_over_mean", "router_grad_ratio", "router_similarity")
}


def test_two_halves_equal_one_run(corpus: Path, overrides: list[str], tmp_path: Path) -> None:
    """40 uninterrupted steps, and 20 steps resumed by the same command with a larger train.steps."""
    words = [*overrides, *NARROW]
    reference = uninterrupted(corpus, words)
    assert train_here([*words, "train.steps=20"]) == 0
    assert len(lines(tmp_path / "run")) == 20
    assert train_here(words) == 0
    assert exact(tmp_path / "run") == reference
    assert len({row["state_hash"] for row in reference.values()}) == 40


def test_killed_run_resumes_bitwise_identical(corpus: Path, overrides: list[str], tmp_path: Path) -> None:
    """SIGKILL some steps after a checkpoint: the steps since are trained again, bitwise identical."""
    words = [*overrides, *NARROW]
    reference = uninterrupted(corpus, words)
    folder = tmp_path / "run"
    process = program("launch", "train", *words, "checkpoint.every=10", "train.steps=2000")
    wait_for_step(folder, 23, process)
    os.killpg(process.pid, signal.SIGKILL)
    finish(process)
    reached = (folder / "metrics.jsonl").read_text().count("\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2001, "lo')  # a line cut by a crash
    assert train_here([*words, f"train.steps={max(40, reached)}"]) == 0
    resumed = exact(folder)
    assert {step: resumed[step] for step in reference} == reference


@pytest.mark.parametrize(
    "variant",
    [
        ["loss.mtp_start_tokens=800", "train.micro_batch_size=1"],
        ["loss.mtp_start_tokens=300", "train.micro_batch_size=4", "data.mask_documents=true"],
        ["train.dtype=bfloat16", "balance.method=sign", "schedule=cosine", "schedule.decay_steps=9"],
        ["model.num_layers=2", "balance.kp=0.1", "balance.kd=0.1", "balance.decay=0.1", "schedule.decay_start=5"],
        ["balance.method=quantile", "balance.smoothing=0.5", "train.micro_batch_size=1"],
        [
            *("train.micro_batch_size=1", "data.packing=best_fit", "data.mask_documents=true"),
            "data.stages=[{start_tokens: 512, sequence_length: 64}]",
        ],
    ],
    ids=[
        "mtp_after-accumulation",
        "mtp_before-documents",
        "bfloat16-sign-cosine",
        "two_layers-pid_decay-wsd",
        "quantile",
        "packed-longer_stage",
    ],
)
def test_resume_is_bitwise_exact(variant: list[str], corpus: Path, overrides: list[str], tmp_path: Path) -> None:
    """10 steps of 128 tokens, stopped after 5; MTP switches on after or before the stop."""
    words = [*overrides, *NARROW, "schedule.decay_steps=4", *variant, "train.steps=10"]
    reference = uninterrupted(corpus, words)
    assert train_here([*words, "train.steps=5"]) == 0
    assert train_here(words) == 0
    assert exact(tmp_path / "run") == reference
    if "data.packing=best_fit" in variant:
        assert all(0 <= row["padding_share"] < 0.5 for row in lines(tmp_path / "run"))
    if "mtp" in variant[0]:
        start = int(variant[0].partition("=")[2])
        used = [row["loss_mtp"] is not None for row in lines(tmp_path / "run")]
        assert used == [row["tokens"] - 128 >= start for row in lines(tmp_path / "run")]
        assert True in used and False in used


def test_resume_is_bitwise_exact_on_two_processes(corpus: Path, overrides: list[str], tmp_path: Path) -> None:
    """Stopped in the middle, and by one rank's non-finite loss: both ranks end with the same code."""
    words = [*overrides, *NARROW, "train.steps=16"]
    codes = train_two(
        [*words, "run.name=straight"],
        [*words, "train.steps=8"],
        words,
        [*words, "optim.lr=1e30", "checkpoint.every=1", "run.name=bad"],
    )
    assert codes == [0, 0, 0, 4]
    assert exact(tmp_path / "run") == exact(tmp_path / "straight")
    assert len(exact(tmp_path / "run")) == 16
    assert exit_json(tmp_path / "bad")["code"] == 4
    good = list_checkpoints(tmp_path / "bad" / "checkpoints")[-1]
    assert f"the last checkpoint is {good};" in exit_json(tmp_path / "bad")["message"], "whichever rank speaks"


def test_same_run_twice_is_bitwise_identical(corpus: Path, overrides: list[str], tmp_path: Path) -> None:
    words = [*overrides, *NARROW, "train.steps=10"]
    assert train_here([*words, "train.seed=1"]) == 0
    assert exact(tmp_path / "run") != uninterrupted(corpus, words), "the seed changes nothing"
    assert train_here([*words, "run.name=again"]) == 0
    assert exact(tmp_path / "again") == uninterrupted(corpus, words)


def test_new_run_starts_from_another_run_s_checkpoint(corpus: Path, overrides: list[str], tmp_path: Path) -> None:
    """It starts from checkpoint.resume=DIR, and resumes from its own checkpoints once it has some."""
    words = [*overrides, *NARROW, "train.steps=10"]
    reference = uninterrupted(corpus, words)
    assert train_here([*words, "train.steps=5"]) == 0
    branch = [*words, "run.name=branch", f"checkpoint.resume={tmp_path / 'run'}"]
    assert train_here([*branch, "train.steps=8"]) == 0
    assert [row["step"] for row in lines(tmp_path / "branch")] == [6, 7, 8]
    assert train_here(branch) == 0
    rows = [json.loads(line, parse_float=str) for line in (tmp_path / "branch" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == list(range(6, 11))
    assert all(row["state_hash"] == reference[row["step"]]["state_hash"] for row in rows)


def test_skipped_checkpoint_is_reported_and_replaced(
    corpus: Path, overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*overrides, *NARROW, "checkpoint.every=2", "train.steps=10", "checkpoint.keep=0"]
    assert train_here([*words, "train.steps=6"]) == 0
    folder = tmp_path / "run" / "checkpoints"
    shard = folder / "step-00000006" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    (folder / "step-00000004" / "manifest.json").unlink()
    capfd.readouterr()
    assert train_here(words) == 0
    said = capfd.readouterr().out
    assert f"skipped {folder / 'step-00000006'}: __0_0.distcp does not have the hash" in said
    assert f"skipped {folder / 'step-00000004'}: no readable manifest.json" in said
    assert f"resumed from {folder / 'step-00000002'}: step 2, 256 tokens" in said
    assert exact(tmp_path / "run") == uninterrupted(corpus, words)
    assert [verify(path).problem for path in list_checkpoints(folder)] == [None] * 5
    assert {"step-00000004.damaged", "step-00000006.damaged"} < {path.name for path in folder.iterdir()}


def test_run_can_go_back_to_its_own_checkpoint(corpus: Path, overrides: list[str], tmp_path: Path) -> None:
    words = [*overrides, *NARROW, "checkpoint.every=4", "train.steps=10", "checkpoint.keep=0"]
    assert train_here([*words, "train.steps=8"]) == 0
    back = tmp_path / "run" / "checkpoints" / "step-00000004"
    assert train_here([*words, f"checkpoint.resume={back}"]) == 0
    assert exact(tmp_path / "run") == uninterrupted(corpus, words)
    names = sorted(path.name for path in back.parent.iterdir())
    assert names == ["step-00000004", "step-00000008", "step-00000008.abandoned", "step-00000010"]


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with everything switched on."""
    out = tmp_path_factory.mktemp("finished")
    words = [
        "model=debug", "model.vocab_size=512", "model.hidden_size=32", *NARROW, f"data.paths=[{corpus}]",
        "train.steps=6", "train.sequence_length=32", "train.global_batch_size=4", "train.micro_batch_size=2",
        "schedule.warmup_steps=3", "validation.every=3", "validation.batches=2", "validation.documents=2",
        "data.validation_fraction=0.1",
        "validation.ngram_baselines=true", "logging.hash_every=2", "logging.routing_every=2",
        "logging.wandb=offline", f"run.dir={out}", "run.name=whole",
    ]  # fmt: skip
    assert train_here(words) == 0
    return out / "whole"


def test_every_documented_metric_is_written(finished: Path) -> None:
    rows = lines(finished)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        expected = METRICS - (set() if row["step"] % 2 == 0 else {"state_hash"})
        expected = expected | ({"val_loss", "val_bits_per_byte"} if row["step"] % 3 == 0 else set())
        norms = {key: value for key, value in row.items() if key.startswith("grad_norm/")}
        parts = PARTS if row["step"] in (1, 2, 4, 6) else set()
        assert norms.keys() == {f"grad_norm/{part}" for part in parts}
        start = {key for key in row if key.startswith(START)}
        named = START_PARTS if row["step"] == 1 else ()
        assert start == {f"{START}{part}_{kind}" for part in named for kind in ("seconds", "cpu_seconds")}
        others = {key for key in row if "/" in key and key not in norms and key not in start}
        assert others == ({f"grad_rms/{part}" for part in parts} | BY_LAYER if parts else set())
        if norms:
            assert sum(norm**2 for norm in norms.values()) == pytest.approx(row["grad_norm"] ** 2, rel=1e-9)
        assert row.keys() - norms.keys() - others - start == expected
        assert all(row[key] is None for key in NEED_A_WINDOW)
        numbers = {key: value for key, value in row.items() if key not in {"state_hash", HASH, *NEED_A_WINDOW}}
        assert all(isinstance(value, int | float) for value in numbers.values()), numbers
        if "state_hash" in row:
            assert int(row["state_hash"], 16) < 1 << 64 and len(row["state_hash"]) == 16
    assert rows[-1]["tokens"] == 6 * 4 * 32


def test_floats_read_back_to_the_same_bits(finished: Path) -> None:
    for line in (finished / "metrics.jsonl").read_text().splitlines():
        spelt = json.loads(line, parse_float=str)
        for key, value in json.loads(line).items():
            if isinstance(value, float):
                assert repr(value) == spelt[key], "not the shortest exact text"
                assert float(value.hex() and float.fromhex(value.hex())) == float(spelt[key])


def test_run_folder_holds_configuration_report_and_exit(finished: Path) -> None:
    stored = yaml.safe_load((finished / "config.yaml").read_text())
    assert stored["train"]["steps"] == 6 and stored["model"]["hidden_size"] == 32
    assert stored["train"]["dtype"] in ("bfloat16", "float32"), "auto is not resolved"
    assert stored["environment"]["packages"]["torch"].startswith("2.")
    assert stored["environment"]["world_size"] == 1 and stored["environment"]["device"].startswith("CPU")
    assert {"command", "python", "driver", "cuda", "git_dirty"} < stored["environment"].keys()
    commit = stored["environment"]["git_commit"]
    assert commit == "unknown" or len(commit) == 40
    assert stored["derived"]["parameters"] > 10_000 and len(stored["derived"]["active_parameters"]) == 3
    assert exit_json(finished) == {"code": 0, "message": "done"}
    page = (finished / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html") and "whole" in page
    assert [path.name for path in (finished / "checkpoints").iterdir()] == ["step-00000006"]


def test_routing_baselines_and_coloured_text_are_written(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "routing.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 4, 6]
    for row in rows:
        assert [len(layer) for layer in row["counts"]] == [6] and [len(layer) for layer in row["bias"]] == [6]
        assert sum(row["counts"][0]) == 4 * 32 * 3, "every token selects K experts"
        assert row["bias"][0][4:] == [0.0, 0.0], "identity experts have no bias"
    baselines = json.loads((finished / "baselines.json").read_text())
    assert max(baselines["trigram"], baselines["bigram"]) < baselines["unigram"]
    documents = json.loads((finished / "text.json").read_text())["documents"]
    assert len(documents) == 2
    for document in documents:
        assert len(document["pieces"]) == len(document["ffn_experts"]) > 0
        assert all(0 <= used <= 3 for used in document["ffn_experts"])
    assert list((finished / "wandb").glob("offline-run-*/*.wandb")), "wandb wrote nothing"


def test_finished_run_is_left_alone(corpus: Path, overrides: list[str], tmp_path: Path) -> None:
    """The same command trains nothing and loses nothing."""
    words = [*overrides, *NARROW, "train.steps=3"]
    assert train_here(words) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert train_here(words) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert exit_json(tmp_path / "run")["code"] == 0
