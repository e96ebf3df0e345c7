"""A step that is left out: weights, moments, step counts, biases and controller stay bit by bit, the counters go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from parallel.mesh import connect
from tests.support.running import TINY, RandomSamples
from tests.train.health.planted import WATCHFUL, plant
from train.batches import BatchReader
from train.checkpoint.dcp_tensors import box_values, saved
from train.compose import compose
from train.health.config import OnSpike
from train.run import build_state
from train.step import Stepper

PLANTED = 24  # the first sample of step 7


@pytest.fixture
def closing() -> Any:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def stepper(words: list[str]) -> Stepper:
    config = compose([*TINY, *WATCHFUL, *words])
    topology = connect(config.parallel)
    samples: Any = RandomSamples(config.train.sequence_length)
    return Stepper(build_state(config, topology), BatchReader(samples, config, topology), config, topology)


def values(run: Stepper) -> list[Tensor]:
    """Copies of weights, moments, AdamW's step counts, biases and the controller's state."""
    tensors = saved(run.state, Tensor.clone)
    return [
        *box_values(tensors),
        *(tensors[key] for key in tensors if key.startswith(("optimizer", "bias", "control"))),
    ]


def equal(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(map(torch.equal, one, two))


@pytest.mark.usefixtures("closing")
@pytest.mark.parametrize(
    "sharding",
    [
        "fsdp",
        "zero1",
        "zero3",
        "zero2 parallel.offload=cpu",
        *(pytest.param(one, marks=pytest.mark.long) for one in ("zero2", "zero3 parallel.offload=cpu")),
    ],
)
def test_a_skipped_step_changes_nothing_but_counters(monkeypatch: pytest.MonkeyPatch, sharding: str) -> None:
    """Nor does it leave gradients behind: the next step is that of a run which never saw the batch."""
    plant(monkeypatch, [PLANTED])
    words = f"parallel.sharding={sharding}".split()
    run = stepper([*words, "health.on_spike=skip"])
    for _ in range(6):
        assert run.step().spike is None
    before = values(run)
    result = run.step()
    assert result.healthy and result.spike is not None and result.spike.action == OnSpike.skip
    assert result.metrics["spike_action"] == "skip" and result.metrics["grad_norm"] > 10
    assert equal(values(run), before)
    counters = run.state.counters
    assert (counters.step, counters.samples, counters.tokens) == (7, 28, 7 * 32)
    following = run.step().metrics
    assert following["first_sample"] == 28
    after = values(run)
    assert not equal(after, before)
    run.state.engine.close()
    dist.destroy_process_group()

    unplanted = stepper(words)
    for _ in range(6):
        unplanted.step()
    counters = unplanted.state.counters
    counters.step, counters.samples, counters.tokens = 7, 28, 7 * 32
    assert unplanted.step().metrics["loss"] == following["loss"]
    assert equal(values(unplanted), after)
    unplanted.state.engine.close()


@pytest.mark.usefixtures("closing")
def test_a_reported_spike_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also against a run that looks for no spike."""
    plant(monkeypatch, [PLANTED])
    found = []
    for words in (["health.on_spike=report"], ["health.window=0"]):
        run = stepper(words)
        results = [run.step() for _ in range(8)]
        found.append((values(run), [result.spike is not None for result in results]))
        dist.destroy_process_group()
    (watched, spikes), (unwatched, none) = found
    assert spikes == [False] * 6 + [True, False] and none == [False] * 8
    assert equal(watched, unwatched)


@pytest.mark.usefixtures("closing")
def test_a_batch_that_is_not_finite_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, [8], gradient=1.0, loss=float("nan"))
    run = stepper(["health.on_spike=skip"])
    results = [run.step() for _ in range(4)]
    assert [result.spike is not None for result in results] == [False, False, True, False]
    assert all(result.healthy for result in results)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in values(run))


@pytest.mark.usefixtures("closing")
def test_the_start_of_mtp_is_no_spike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient adds to the norm from step 9 on; the windows start anew."""
    run = stepper(["loss.mtp_start_tokens=256", "loss.mtp_weight=50", "health.on_spike=skip"])
    norms = [run.step() for _ in range(10)]
    assert norms[8].metrics["grad_norm"] > 5 * norms[7].metrics["grad_norm"]
    assert [result.spike for result in norms] == [None] * 10
    assert len(run.state.health.norms) == 2


@pytest.mark.usefixtures("closing")
def test_gradient_rms_is_that_of_the_gradient_adamw_gets(monkeypatch: pytest.MonkeyPatch) -> None:
    """By layer and part, after clipping."""
    run = stepper(["optim.grad_clip=0.01"])
    gradients: dict[str, list[Tensor]] = {}

    def keep(self: Any) -> None:
        for box in self.gradients():
            kinds = {"layers": "layer_0", "embed_tokens": "embedding", "mtp": "mtp"}
            part = kinds.get(box.name.partition(".")[0], "head")
            gradients.setdefault(part, []).append(box.values.double().flatten().clone())

    monkeypatch.setattr(type(run.state.store), "step", keep)
    measured = run.step().by_layer
    for part, parts in gradients.items():
        expected = torch.cat(parts).square().mean().sqrt()
        assert measured[f"grad_rms/{part}"] == pytest.approx(float(expected), rel=1e-5)
    assert set(gradients) == {"layer_0", "embedding", "head", "mtp"}
