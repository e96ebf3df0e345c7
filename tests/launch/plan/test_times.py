"""Times of ranks that share cores, gathers of a pipeline, and a calibration's file."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.plan import calibrate
from launch.plan.cluster import PRESETS, Cluster, find_cluster
from launch.plan.links import Group, TrafficPattern, seconds
from launch.plan.sharding import exposed_sharding
from launch.plan.step import PhaseTimes, Step
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


@pytest.mark.parametrize(
    ("gpus_per_node", "cores", "expected"),
    [(2, 0, 6.0), (2, 2, 6.0), (2, 1, 12.0), (4, 2, 6.0), (4, 1, 12.0), (1, 1, 6.0)],
)
def test_ranks_of_a_stage_share_the_cores_of_their_node(gpus_per_node: int, cores: int, expected: float) -> None:
    """Two stages of two ranks and one micro-batch: the stages compute one after the other, a stage's ranks at once."""
    config = compose([*COMMON, "train.global_batch_size=4", "parallel.pp=2", "parallel.schedule=1f1b"])
    sizes = resolve_sizes(config.parallel, 4)
    node = replace(PRESETS["h800"], gpus_per_node=gpus_per_node, cores=cores, memory=1e30)
    cluster = replace(node, inside=1e30, inside_latency=0.0, network=1e30, network_latency=0.0)
    stages = [Summary(SECONDS, (1,), 1), Summary(SECONDS, (1,), 1)]
    found = predict(config, sizes, batch_shape(config, sizes), cluster, stages)
    assert found.seconds == pytest.approx(expected)


GATHER, SUM = SpanKind.WEIGHT_ALL_GATHER.value, SpanKind.GRADIENT_REDUCE_SCATTER.value
# Three layers of 1 + 2 s; each gathers 1.5 bytes and sums 3, the root 5 and 10
SHARDED = {
    ("seconds", 0, "forward"): 3.0,
    ("seconds", 0, "backward"): 6.0,
    ("bytes", 0, "forward", GATHER): 5 + 3 * 1.5,
    ("root bytes", 0, "forward", GATHER): 5.0,
    ("bytes", 0, "backward", GATHER): 3 * 1.5,
    ("bytes", 0, "backward", SUM): 10 + 3 * 3.0,
    ("root bytes", 0, "backward", SUM): 10.0,
    ("count", 0, "forward", GATHER): 4.0,
    ("root count", 0, "forward", GATHER): 1.0,
    ("count", 0, "backward", GATHER): 3.0,
    ("count", 0, "backward", SUM): 4.0,
    ("root count", 0, "backward", SUM): 1.0,
}
FORWARD = 3 + 5 + 1.5 + 2 * (1.5 - 1)  # a layer hides 1 s of the next one's gather
BACKWARD = 6 + 1.5  # the last layer's gather; those of the others are hidden
LAST = 6 + 1.5 + (1.5 + 3 - 2) + (3 - 2) + 3 + 10  # layer 1 hides a gather and a sum, layer 0 a sum


def sharded_step(*overrides: str, ranks: int = 2) -> Step:
    """One on a link of 1 byte/s, with computation that takes what the summary says."""
    config = compose([*COMMON, "model.num_layers=3", "model.num_mtp_layers=0", *overrides])
    sizes = resolve_sizes(config.parallel, ranks)
    fast = {"bfloat16": 1e30, "memory": 1e30, "inside_latency": 0.0, "links_reached": 1.0}
    return Step(config, sizes, batch_shape(config, sizes), replace(PRESETS["h800"], inside=1.0, **fast))


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_layers_hide_what_fsdp_sends_next(micro_batches: int) -> None:
    step = sharded_step(f"train.global_batch_size={4 * micro_batches}", "train.micro_batch_size=2")
    assert step.batch.num_micro_batches == micro_batches
    found = predict(step.config, step.sizes, step.batch, step.cluster, [Summary(SHARDED, (3,), 1)])
    assert found.seconds == pytest.approx(micro_batches * FORWARD + (micro_batches - 1) * BACKWARD + LAST)
    by_name = {line.what: line for line in found.lines}
    assert by_name["weight all-gather"].num_bytes == pytest.approx(micro_batches * (5 + 6 * 1.5))
    assert by_name["weight all-gather"].exposed == pytest.approx(micro_batches * (FORWARD - 3 + BACKWARD - 6))
    assert by_name["gradient reduce-scatter"].seconds == pytest.approx(19)
    assert by_name["gradient reduce-scatter"].exposed == pytest.approx(LAST - BACKWARD)


def test_other_messages_leave_less_of_the_link() -> None:
    """They use half of a forward's window."""
    step = sharded_step("train.global_batch_size=4", "train.micro_batch_size=2")
    spent = {(0, "forward"): PhaseTimes(3.0, 1.5), (0, "backward"): PhaseTimes(6.0, 0.0)}
    exposed = exposed_sharding(step, Summary(SHARDED, (3,), 1), spent)
    assert exposed == pytest.approx(FORWARD - 3 + LAST - 6 + 2 * 0.5)


def test_on_cpus_replicas_wait_for_each_sum() -> None:
    step = sharded_step("train.global_batch_size=8", "train.micro_batch_size=2", "parallel.dp=2", ranks=4)
    spent = {(0, "forward"): PhaseTimes(3.0, 0.0), (0, "backward"): PhaseTimes(6.0, 0.0)}
    step.cluster = replace(step.cluster, on_gpu=False)
    exposed = exposed_sharding(step, Summary(SHARDED, (3,), 1), spent)
    assert exposed == pytest.approx(FORWARD - 3 + BACKWARD - 6 + 19)


@pytest.mark.parametrize(("network", "exposed"), [(0.5, (17 + 5, 41 - 5)), (1e30, (0, 0))])
def test_on_cores_copies_and_idle_time_add_up(network: float, exposed: tuple[float, float]) -> None:
    """A core copies each message at 2 bytes/s, and idles where the network leaves more than that exposed."""
    step = sharded_step("train.global_batch_size=4", "train.micro_batch_size=2")
    cpus = replace(step.cluster, on_gpu=False, cores=1, gpus_per_node=1, inside=2.0, network_latency=0.0)
    cluster = replace(cpus, network=network)
    found = predict(step.config, step.sizes, step.batch, cluster, [Summary(SHARDED, (3,), 1)])
    copies = (5 + 6 * 1.5) / 2, 19 / 2
    assert tuple(line.exposed for line in found.lines) == pytest.approx(exposed)
    idle = sum(max(0.0, one - copied) for one, copied in zip(exposed, copies, strict=True))
    assert found.seconds == pytest.approx(9 + sum(copies) + idle)


def test_on_cpus_each_rank_receives_from_each_other_node() -> None:
    """Of four ranks on two nodes; on GPUs a node receives each byte once."""
    node = replace(PRESETS["h800"], gpus_per_node=2, inside=1e30, network=1.0, network_latency=0.0, links_reached=1.0)
    assert seconds(node, Group(4, 1), TrafficPattern.ring, 3.0) == pytest.approx(1.5)
    assert seconds(replace(node, on_gpu=False), Group(4, 1), TrafficPattern.ring, 3.0) == pytest.approx(2.0)


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
    of_two, of_four = (seconds(node, Group(size, 1), TrafficPattern.ring, 0.0, count=5.0) for size in (2, 4))
    assert (of_two, of_four) == (pytest.approx(5e-3), pytest.approx(15e-3))
    assert seconds(replace(node, on_gpu=True), Group(4, 1), TrafficPattern.ring, 0.0, count=5.0) == pytest.approx(5e-3)


def alone() -> str:
    calibrate.SECONDS, calibrate.SIZE = 0.01, 64
    with pytest.raises(ConfigError, match="messages need two ranks"):
        calibrate.calibrate("alone")
    return "refused"


def test_calibration_of_one_rank_is_refused() -> None:
    assert run_ranks(alone, 1) == ["refused"]
