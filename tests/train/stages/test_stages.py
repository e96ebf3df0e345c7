"""Runs through stages: exact resumes on both sides of a border, layouts, what a checkpoint says, refusals."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from launch.plan.plan import PlanOptions, choose_stage
from longcat.errors import ConfigError
from longcat.rope import RopeScaling, rotary_angles
from parallel.watchdog.events import SpanKind
from parallel.watchdog.spans import SPANS
from tests.support.exporting import run_command
from tests.support.fixtures import Refused
from tests.support.running import NARROW, exact, lines, train_here, train_two
from train.api import build_session
from train.api import compose as configuration
from train.checkpoint.offline_reader import Checkpoint
from train.compose import compose
from train.config import Config
from train.data.epochs import CorpusReader, EpochIndex
from train.health.ranges import SampleRanges
from train.stages.configs import configs_of_stages, list_stages, segments_of, stage_config, tokens_seen

STEP = 8 * 32  # tokens
YARN = "{factor: 4, original_max_position_embeddings: 32}"
STAGES = (
    f"data.stages=[{{start_tokens: {2 * STEP}, weights: [2], ramp_tokens: {STEP}}}, "
    f"{{start_tokens: {4 * STEP - 7}, sequence_length: 64, rope_theta: 5e6, mtp_weight: 0.3}}, "
    f"{{start_tokens: {8 * STEP}, sequence_length: 128, rope_scaling: {YARN}}}]"
)


@pytest.fixture
def words(overrides: list[str]) -> list[str]:
    """12 steps of 8 × 32, then from step 5 on of 4 × 64 and from step 9 on of 2 × 128 tokens."""
    return [
        *overrides,
        *NARROW,
        "train.steps=12",
        "train.global_batch_size=8",
        "train.micro_batch_size=4",
        "train.dtype=float32",
        "loss.mtp_weight=0",
        "data.weights=[1]",
        "validation.every=4",
        "validation.batches=1",
        "checkpoint.keep=0",
        STAGES,
    ]


def test_a_run_resumes_exactly_around_each_border(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Before it, on it and after it: losses, gradient norms and state hashes are those of an uninterrupted run."""
    assert train_here([*words, "run.name=whole"]) == 0
    said = [line for line in capfd.readouterr().out.splitlines() if re.match(r"stage \d from step \d+: ", line)]
    assert [line.partition(":")[0] for line in said] == [
        f"stage {n} from step {step}" for n, step in ((1, 3), (2, 5), (3, 9))
    ]
    assert "weights 2 over 256 tokens" in said[0]
    assert "4 × 64 tokens a step; RoPE base 5e+06; MTP weight 0.3" in said[1]
    for stop in (3, 4, 5, 9, 12):
        assert train_here([*words, f"train.steps={stop}"]) == 0
    whole, stopped = exact(tmp_path / "whole"), exact(tmp_path / "run")
    assert stopped == whole and len(whole) == 12
    rows = lines(tmp_path / "whole")
    assert [row["first_sample"] for row in rows] == [0, 8, 16, 24, 32, 36, 40, 44, 48, 50, 52, 54]
    assert [row["tokens"] for row in rows] == [STEP * step for step in range(1, 13)]
    assert [row["loss_mtp"] is None for row in rows] == [True] * 4 + [False] * 8
    assert [row["step"] for row in rows if row.get("val_loss")] == [4, 8, 12]

    checkpoints = {path.name[-2:]: Checkpoint(path) for path in (tmp_path / "run" / "checkpoints").iterdir()}
    sizes = {step: (one.sequence_length, one.model.rope_theta) for step, one in sorted(checkpoints.items())}
    early, middle, late = (32, 1e6), (64, 5e6), (128, 5e6)
    assert sizes == {"03": early, "04": early, "05": middle, "09": late, "12": late}
    assert checkpoints["09"].model.rope_scaling.factor == 4 and checkpoints["05"].model.rope_scaling.factor == 1


def test_a_resume_with_another_batch_needs_whole_steps(words: list[str], tmp_path: Path, refused: Refused) -> None:
    """Before the first stage too: a step of 16 samples from sample 24 on would reach over sample 32."""
    words[-1] = f"data.stages=[{{start_tokens: {4 * STEP}, sequence_length: 64}}]"
    assert train_here([*words, "train.steps=3"]) == 0
    (before,) = (tmp_path / "run" / "checkpoints").iterdir()
    other = [*words, f"checkpoint.resume={before}"]
    border = "at sample 24 of its data, 8 samples before data.stages[0], which begins at sample 32"
    refused(["train", *other, "train.global_batch_size=16", "run.name=refused"], border, "steps of 16 samples")
    assert train_here([*other, "train.global_batch_size=4", "train.steps=6", "run.name=other"]) == 0
    assert [row["first_sample"] for row in lines(tmp_path / "other")] == [24, 28, 32]


def test_a_batch_does_not_reach_into_another_stage(words: list[str], tmp_path: Path) -> None:
    with build_session(configuration(*words)) as session:
        reader = session._stepper.reader
        assert reader.end == 32 and len(list(reader.read(24))) == 2
        with pytest.raises(ConfigError, match="8 samples of a step end with sample 35, in the stage"):
            next(reader.read(28))


def test_the_index_of_a_length_is_made_at_the_border(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In a slow span, which the watchdog gives more time than a step: large corpora take minutes."""
    spans = []

    def read_or_build(reader: CorpusReader, *arguments: Any) -> EpochIndex:
        if arguments[0] == "epoch" and reader._sequence_length == 64 and reader.split == "train":
            spans.append(SPANS.innermost)
        return original(reader, *arguments)

    original = CorpusReader._read_or_build
    monkeypatch.setattr(CorpusReader, "_read_or_build", read_or_build)
    with build_session(configuration(*words)) as session:
        for _ in range(5):
            session.step()
    (span,) = spans
    assert span is not None and span.slow and span.event.kind == SpanKind.CORPUS_INDEX


def test_export_and_the_next_run_take_a_stage_s_positions(words: list[str], tmp_path: Path, refused: Refused) -> None:
    """A run without stages may start from a checkpoint inside one with its RoPE base, and with no other."""
    assert train_here([*words, "train.steps=9"]) == 0
    (border,) = (tmp_path / "run" / "checkpoints").iterdir()
    run_command("export", f"source={border}", f"target={tmp_path / 'exported'}")
    exported = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert (exported["rope_theta"], exported["max_position_embeddings"]) == (5e6, 128)
    assert exported["rope_scaling"]["factor"] == 4 and exported["rope_scaling"]["rope_type"] == "yarn"
    scaling = ["model.rope_scaling.factor=4", "model.rope_scaling.original_max_position_embeddings=32"]
    later = [*words[:-1], f"checkpoint.resume={border}", "data.from_start=true", "train.steps=10", *scaling]
    assert train_here([*later, "model.rope_theta=5e6", "run.name=same"]) == 0
    refused(["train", *later, "model.rope_theta=2e6", "run.name=other"], "is of another model", "model.rope_theta")
    where = "is of another model in the stage of data.stages that it is in: model.rope_theta was 5000000.0"
    refused(["train", *later, "run.name=base"], where, "is now 1000000.0; set them equal")


def test_a_session_goes_through_the_same_stages(words: list[str], tmp_path: Path) -> None:
    """Also one that resumes behind a border; its micro-batches keep their tokens."""
    assert train_here([*words, "train.steps=6"]) == 0
    rows = lines(tmp_path / "run")
    with build_session(configuration(*words, "run.name=session")) as session:
        assert [session.step()["loss"] for _ in range(6)] == [row["loss"] for row in rows]
        (model,) = session.state.models
        assert (model.config.rope_theta, session._stepper.config.train.micro_batch_size) == (5e6, 2)
        saved = session.save()
        expected = [session.step()["loss"] for _ in range(4)]
        angles = rotary_angles(torch.arange(128), 8, 5e6, RopeScaling(4, 32))
        assert torch.equal(model.angles(torch.zeros(1, 128)), angles)
        assert all(attention.config is model.config for attention in model.shortcut_layers()[0].self_attn)
    with build_session(configuration(*words, "run.name=session")) as session:
        session.resume(saved)
        assert [session.step()["loss"] for _ in range(4)] == expected


def test_stages_under_context_and_pipeline_parallelism(words: list[str], tmp_path: Path) -> None:
    """Losses and gradient norms within the rounding of sums of those without; a pipeline has another shape then."""
    few = ["train.steps=10", "model.num_layers=2", "train.micro_batch_size=2"]
    plain = [*(word for word in words if "num_layers" not in word), *few]
    assert train_here(plain) == 0
    shapes = {"cp": ["parallel.cp=2"], "pp": ["parallel.pp=2", "parallel.schedule=1f1b"]}
    assert train_two(*([*plain, *shape, f"run.name={name}"] for name, shape in shapes.items())) == [0, 0]
    expected = lines(tmp_path / "run")
    for name in shapes:
        for row, other in zip(expected, lines(tmp_path / name), strict=True):
            for key in {"loss", "grad_norm", "val_loss"} & row.keys():
                assert other[key] == pytest.approx(row[key], rel=2e-5), (name, row["step"], key)


@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_mtp_goes_on_where_it_was_off(words: list[str], sharding: str, tmp_path: Path) -> None:
    """Under each engine weights, moments and step counts of MTP stay while it is off, whatever becomes of the rest."""
    stages = f"data.stages=[{{start_tokens: {3 * STEP}, mtp_weight: 0}}, {{start_tokens: {6 * STEP}, mtp_weight: 0.3}}]"
    more = ["loss.mtp_weight=0.3", "train.steps=9", "validation.every=0", "optim.lr=1e-2", "schedule.warmup_steps=0"]
    for name in ("fsdp", sharding):
        assert train_here([*words[:-1], *more, stages, f"parallel.sharding={name}", f"run.name={name}"]) == 0
    expected, found = lines(tmp_path / "fsdp"), lines(tmp_path / sharding)
    assert [row["loss_mtp"] is None for row in found] == [False] * 3 + [True] * 3 + [False] * 3
    for row, other in zip(expected, found, strict=True):
        for key in ("loss", "loss_mtp", "grad_norm"):
            assert (other[key] or 0) == pytest.approx(row[key] or 0, rel=1e-4), (row["step"], key)


def test_a_stage_behind_the_last_step_is_told(words: list[str]) -> None:
    for steps, is_late in ((9, False), (8, True)):
        found = [text for _, text in list_stages(compose([*words, f"train.steps={steps}"]))]
        assert [text.partition(":")[0] for text in found] == ["from step 3", "from step 5", "from step 9"]
        ends = [text.endswith("(not in this run, which ends with step 8)") for text in found]
        assert ends == [False, False, is_late]


def test_configurations_of_stages_keep_a_step_s_tokens(words: list[str]) -> None:
    config: Config = compose(words)
    found: list[tuple[Any, ...]] = [
        (name, one.train.sequence_length, one.train.global_batch_size, one.train.micro_batch_size, one.loss.mtp_weight)
        for name, one in configs_of_stages(config)
    ]
    assert found == [("", 32, 8, 4, 0.0), ("data.stages[1]", 64, 4, 2, 0.3), ("data.stages[2]", 128, 2, 1, 0.3)]
    assert [segment.start for segment in segments_of(config)] == [0, 16, 32, 48]
    assert choose_stage(config, PlanOptions()) == 3 and choose_stage(config, PlanOptions(stage=0)) == 0


@pytest.mark.parametrize(
    ("first", "length", "expected"),
    [((12, 40, 4), 48, (10, 2)), ((12, 40, 12), 60, (8, 8)), ((12, 40, 1), 60, (8, 1)), ((6, 32, 6), 48, (4, 4))],
)
def test_a_micro_batch_divides_the_batch_of_its_stage(
    first: tuple[int, int, int], length: int, expected: tuple[int, int]
) -> None:
    """The largest one that has no more tokens than before."""
    words = [
        f"train.{key}={value}"
        for key, value in zip(("global_batch_size", "sequence_length", "micro_batch_size"), first, strict=True)
    ]
    config = compose(["model=debug", *words, f"data.stages=[{{start_tokens: 5000, sequence_length: {length}}}]"])
    train = stage_config(config, 1).train
    assert (train.global_batch_size, train.micro_batch_size) == expected


def test_every_way_to_start_checks_every_stage(overrides: list[str], refused: Refused, tmp_path: Path) -> None:
    """longcat train, plan and slurm refuse a stage with fewer micro-batches than data-parallel ranks alike."""
    few = [*overrides, *NARROW, "train.global_batch_size=8", "train.micro_batch_size=1", "parallel.dp=4"]
    few.append("data.stages=[{start_tokens: 5000, sequence_length: 256}]")
    parts = ("data.stages[0] (with sequence_length=", "becomes 1): train.global_batch_size=", "4 data-parallel ranks")
    refused(["train", *few, "run.num_processes=4"], *parts)
    refused(["plan", *few, "plan.ranks=4"], *parts)
    refused(["slurm", *few, "slurm.nodes=4", "slurm.gpus_per_node=0"], *parts)


def test_tokens_seen_leave_out_what_was_skipped(words: list[str]) -> None:
    """40 samples of which a rollback left out 8 before the border at 32, and 4 behind it."""
    parts = segments_of(compose(words))
    skipped = SampleRanges([(8, 16), (36, 40)])
    assert [tokens_seen(parts, count, skipped) for count in (8, 24, 28, 32)] == [8 * 32, 24 * 32, 1024, 1280]


@pytest.mark.parametrize(
    ("stage", "more", "parts"),
    [
        ("sequence_length: 48", [], ["data.stages[0].sequence_length=48 does not divide the 256 tokens of a step"]),
        (
            "sequence_length: 256",
            ["parallel.dp=2", "run.num_processes=2"],
            [
                "data.stages[0] (with sequence_length=256, train.global_batch_size=8 becomes 1 and "
                "train.micro_batch_size=1 becomes 1): ",
                "2 data-parallel",
            ],
        ),
        ("sequence_length: 256", ["train.micro_batch_size=2", "train.elastic_bits=2"], ["data.stages[0] ", "elastic"]),
        ("rope_scaling: {factor: 4}", [], ["data.stages[0]: ", "original_max_position_embeddings"]),
        ("rope_theta: 0.5", [], ["data.stages[0]: ", "model.rope_theta=0.5 must be at least 1"]),
        ("mtp_weight: -1", [], ["data.stages[0]: ", "loss.mtp_weight=-1"]),
        ("sequence_lenght: 64", [], ["sequence_lenght"]),
        (
            "sequence_length: 131072",
            ["train.global_batch_size=4096"],
            ["one sample needs 131073", "lower data.stages[0].sequence_length=131072"],
        ),
        ("mtp_weight: 0.1", ["model.num_mtp_layers=0"], ["data.stages[0].mtp_weight=0.1 changes nothing"]),
    ],
)
def test_impossible_stages_end_with_one_line(
    stage: str, more: list[str], parts: list[str], overrides: list[str], refused: Refused, tmp_path: Path
) -> None:
    few = [*overrides, *NARROW, "train.global_batch_size=8", "train.micro_batch_size=1", *more]
    refused(["train", *few, f"data.stages=[{{start_tokens: 512, {stage}}}]"], *parts)
