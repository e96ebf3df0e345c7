"""Times of ranks that share cores, gathers of a pipeline, and a calibration's file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.plan import calibrate
from launch.plan.cluster import PRESETS, Cluster, find_cluster
from launch.plan.links import Group, Pattern, seconds
from launch.plan.summary import Summary, summarise
from launch.plan.times import predict
from launch.plan.trace import Scope, Traced
from longcat.errors import ConfigError
from parallel.mesh import resolve_sizes
from parallel.plan.rates import Rates
from parallel.plan.recorder import OUTSIDE, Phase, Traffic, Work
from parallel.watchdog.events import SpanKind
from tests.launch.plan.allocations import COMMON
from tests.support.distributed import run_ranks
from train.check import batch_shape
from train.compose import compose

SECONDS = {("seconds", 0, "forward"): 1.0, ("seconds", 0, "backward"): 2.0}


@pytest.mark.parametrize(("cores", "expected"), [(0, 3.0), (4, 3.0), (2, 6.0), (1, 12.0)])
def test_ranks_share_the_cores_of_their_node(cores: int, expected: float) -> None:
    """Four ranks of one micro-batch, which computes for three seconds."""
    config = compose([*COMMON, "train.global_batch_size=8"])
    sizes = resolve_sizes(config.parallel, 4)
    cluster = replace(PRESETS["h800"], memory=1e30, inside=1e30, inside_latency=0.0, cores=cores)
    found = predict(config, sizes, batch_shape(config, sizes), cluster, [Summary(SECONDS, (2,), 1)])
    assert found.seconds == pytest.approx(expected)


def test_pipeline_gathers_once_a_step() -> None:
    """With its first micro-batch, whatever the last one does."""
    first, last = (Phase("forward", (0, 2), number) for number in (1, 2))
    traffic = {(SpanKind.WEIGHT_ALL_GATHER, first): Traffic(3, 300), (SpanKind.EXPERT_DISPATCH, last): Traffic(1, 10)}
    phases = {phase: Work() for phase in (OUTSIDE, first, last)}
    found = summarise(Traced(Scope(), 0, 0, 0, 0, 2, (2,), phases, traffic, 0.0))
    gathers = SpanKind.WEIGHT_ALL_GATHER.value
    assert (found.of("step bytes", gathers), found.of("step count", gathers)) == (300, 3)
    assert found.of("bytes", 0, "forward", gathers) == 0
    assert found.of("bytes", 0, "forward", SpanKind.EXPERT_DISPATCH.value) == 10


def calibrated() -> Cluster:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    calibrate.SECONDS, calibrate.SIZE = 0.01, 64
    return calibrate.calibrate("here")


def test_calibration_is_read_again(tmp_path: Path) -> None:
    found, other = run_ranks(calibrated, 2)
    assert found == replace(other, memory_gib=found.memory_gib)
    assert found.gpus_per_node == 2 and not found.on_gpu and found.cores > 0
    assert min(found.bfloat16, found.float32, found.memory, found.inside, found.network, found.call) > 0
    path = tmp_path / "here.yaml"
    path.write_text(calibrate.as_yaml(found))
    read = find_cluster(str(path))
    assert read.name == "here" and read.cores == found.cores
    assert read.inside == pytest.approx(found.inside, rel=1e-5)


def test_calibration_finds_what_a_model_reaches(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the measured seconds of two steps whose operators are known: large ones and small ones in both."""
    steps = {calibrate.FEW: [1e-7] * 900 + [4e-5] * 20, calibrate.MANY: [1e-7] * 700 + [2e-4] * 200}

    def step(rates: Rates, device: torch.device, shape: tuple[int, int]) -> tuple[list[float], float]:
        return steps[shape], sum(max(one / 0.4, 3e-5) for one in steps[shape])

    monkeypatch.setattr(calibrate, "_step", step)
    found = calibrate.fit(Rates(1.0, 1.0, 1.0), torch.device("cpu"))
    assert found == pytest.approx((0.4, 3e-5), rel=0.01)


def test_on_cpus_a_message_waits_for_each_peer() -> None:
    node = replace(find_cluster("h100"), inside_latency=1e-3, cores=2, on_gpu=False)
    of_two, of_four = (seconds(node, Group(size, 1), Pattern.ring, 0.0, count=5.0) for size in (2, 4))
    assert (of_two, of_four) == (pytest.approx(5e-3), pytest.approx(15e-3))
    assert seconds(replace(node, on_gpu=True), Group(4, 1), Pattern.ring, 0.0, count=5.0) == pytest.approx(5e-3)


def alone() -> str:
    calibrate.SECONDS, calibrate.SIZE = 0.01, 64
    with pytest.raises(ConfigError, match="messages need two ranks"):
        calibrate.calibrate("alone")
    return "refused"


def test_calibration_of_one_rank_is_refused() -> None:
    assert run_ranks(alone, 1) == ["refused"]
