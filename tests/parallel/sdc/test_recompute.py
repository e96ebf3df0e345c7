"""Repeating operator calls from permuted operands: silent on sound hardware, and what it finds on a defective unit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

import longcat.ops.fp32_linear
import parallel.sdc.recompute as recompute
from longcat.faults import install_hook
from longcat.ops import fusion
from longcat.ops.calls import set_observer
from longcat.ops.elementwise import added_norm, residual_sum, rms_norm
from longcat.ops.fp32_linear import fp32_linear
from longcat.ops.matmul import rotated_linear
from longcat.ops.rotation import expanded_keys
from parallel.mesh import make_topology, resolve_sizes, world_from_environment
from parallel.sdc.inject import Injector
from parallel.sdc.recompute import Persistence, Recomputer, compared
from parallel.sdc.spec import parse_faults
from tests.support.faults import Everything
from tests.support.measure import MODEL, samples
from tests.support.pool import close_pools, pool
from train.batches import BatchReader
from train.compose import compose
from train.run import build_state
from train.step import Stepper

Found = tuple[int, str, str, str]  # step, operator, module, persistence
WHOLE = ["model.hidden_size=64", "model.ffn_hidden_size=64", "model.expert_hidden_size=32"]  # whole vectors
LAYERS = ("model.num_layers=2", "train.global_batch_size=2", "balance.num_groups=2")


@pytest.fixture(scope="module", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()


def train(words: list[str], steps: int, faults: list[str], all_calls: bool, permuted: bool) -> tuple[list[Found], int]:
    """What is found in some steps of this rank's layout, and the calls of a step. A collective."""
    config = compose([*MODEL, *LAYERS, "sdc.every=0", *words])
    rank, _, world_size = world_from_environment()
    sizes = resolve_sizes(config.parallel, world_size)
    topology = make_topology(sizes, rank, world_size, torch.device("cpu"))
    state = build_state(config, topology)
    stepper = Stepper(state, BatchReader(samples(config), config, topology), config, topology)  # type: ignore[arg-type]
    recomputer, injector = (Everything if all_calls else Recomputer)(1), Injector(parse_faults(faults), rank)
    whole = recompute.permuting
    found: list[Found] = []
    try:
        recomputer.install(list(state.models))
        injector.install()
        if not permuted:
            recompute.permuting = nullcontext  # type: ignore[assignment]
        for step in range(1, steps + 1):
            recomputer.begin_step(step)
            injector.begin_step(step)
            stepper.step()
            recomputer.end_step()
            found += [(step, one.operator, one.module, str(one.persistence)) for one in recomputer.take()]
    finally:
        recompute.permuting = whole
        install_hook(None)
        set_observer(None)
    state.engine.close()
    assert recomputer.checked > 0
    return found, recomputer._total


LAYOUTS = {
    "one": (1, []),
    "bfloat16": (1, ["train.dtype=bfloat16"]),
    "recomputed": (1, ["parallel.recompute=full", "data.mask_documents=true"]),
    "deferred": (2, ["parallel.pp=2", "parallel.schedule=zbv", "model.num_layers=4"]),
    "ep-chunks": (2, ["parallel.ep=2", "overlap.num_chunks=2"]),
    "cp-tp": (4, ["parallel.cp=2", "parallel.tp=2", "parallel.ep=4"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_call_differs_on_sound_hardware(layout: str) -> None:
    """Every call of two steps, forward and backward, deferred weight gradients too."""
    ranks, words = LAYOUTS[layout]
    for found, _ in pool(ranks).run(train, words, 2, [], True, True):
        assert found == []


def test_stuck_lane_is_found_in_the_first_repeated_product() -> None:
    ((found, _),) = pool(1).run(train, [], 8, ["product/lane/step:3/persistent"], False, True)
    steps = {step for step, *_ in found}
    assert found[0][1:] == ("linear, forward", "layers.0.self_attn.0.q_a_proj", Persistence.lasting), found
    assert min(steps) <= 4


def test_every_kind_of_product_shows_a_stuck_lane() -> None:
    ((found, _),) = pool(1).run(train, WHOLE, 2, ["product/lane/step:1/persistent"], True, True)
    operators = {operator for _, operator, *_ in found}
    assert operators >= {
        "linear, forward", "linear, backward", "experts, forward", "experts, backward", "attention, forward",
        "attention, backward", "cross-entropy", "cross-entropy, hidden gradient", "cross-entropy, weight gradient",
    }, operators  # fmt: skip


def test_deferred_weight_gradient_shows_a_stuck_lane() -> None:
    words = [*WHOLE, *LAYOUTS["deferred"][1]]
    ((found, _), _) = pool(2).run(train, words, 1, ["product/lane/step:1/persistent"], True, True)
    assert {operator for _, operator, *_ in found} >= {"linear weight", "experts weight"}, found


def test_every_vector_operation_shows_a_stuck_element() -> None:
    ((found, _),) = pool(1).run(train, WHOLE, 2, ["elementwise/bits/step:1/persistent"], True, True)
    operators = {operator for _, operator, *_ in found}
    assert operators >= {"norm, forward", "norm, backward", "attention, forward", "cross-entropy"}, operators


def test_swiglu_shows_a_stuck_lane() -> None:
    """Sums over a row must keep their order, so norms and softmaxes stay in their lanes."""
    fault = "elementwise/lane/step:1/name:swiglu/persistent"
    ((found, _),) = pool(1).run(train, WHOLE, 2, [fault], True, True)
    assert {operator for _, operator, *_ in found} >= {"linear, forward", "experts, forward", "linear, backward"}


@pytest.mark.parametrize("strike", ["lane", "bits"])
def test_operators_of_one_pass_show_a_stuck_fault(strike: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, by the plain versions. A norm shows a stuck lane too: its sums are by halves."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).requires_grad_()

    monkeypatch.setattr(fusion, "is_on_gpu", lambda _: True)
    monkeypatch.setattr(longcat.ops.fp32_linear, "multiplies_in_parts", lambda *_: True)
    generator = torch.Generator().manual_seed(0)
    x, y, gain, weight, router = draw(1, 32, 64), draw(1, 32, 64), draw(64), draw(96, 64), draw(16, 64)
    angles = torch.polar(torch.ones(32, 16), torch.randn(32, 16, generator=generator))
    recorder, injector = Everything(1), Injector(parse_faults(f"elementwise/{strike}/seed:4/persistent"), 0)
    injector.begin_step(1)
    injector.install()
    set_observer(recorder)
    try:
        parts = [
            rms_norm(x, gain, 1e-6), *added_norm(x, y, gain, 1e-6), residual_sum(x, y, x),
            rotated_linear(x, weight, 48, angles), *expanded_keys(draw(1, 32, 2, 64), draw(1, 32, 32), angles, 32, 64),
            fp32_linear(x[0].bfloat16(), router),
        ]  # fmt: skip
        torch.cat([one.flatten() for one in parts]).square().sum().backward()  # type: ignore[no-untyped-call]
    finally:
        set_observer(None)
        install_hook(None)
    operators = {one.operator for one in recorder.take()}
    wanted = {f"{name}, {way}" for name in ("norm", "added_norm", "keys_and_values") for way in ("forward", "backward")}
    wanted |= {"residual_sum, forward", "linear, forward", "linear, backward", "router, forward", "router, backward"}
    assert operators >= wanted, wanted - operators


def test_identical_repetition_does_not_see_a_stuck_lane() -> None:
    ((found, _),) = pool(1).run(train, [], 2, ["product/lane/step:1/persistent"], True, False)
    assert found == []


@pytest.mark.parametrize("place", ["activation", "gradient", "attention_backward"])
def test_transient_fault_in_a_repeated_call_is_found(place: str) -> None:
    ((found, _),) = pool(1).run(train, [], 2, [f"{place}/bits/step:2/call:3"], True, True)
    assert [one[3] for one in found] == [Persistence.transient], found


def test_calls_rotate_through_the_whole_step() -> None:
    recomputer = Recomputer(2)
    chosen = []
    for step in range(1, 12):
        recomputer.begin_step(step)
        chosen.append([number for number in range(5) if recomputer._is_chosen()])
        recomputer.end_step()
    assert chosen == [[], [1], [], [2], [], [3], [], [4], [], [0], []]


def test_comparison_sees_bits_that_equality_does_not() -> None:
    zero, nan = torch.zeros(3), torch.full((3,), float("nan"))
    assert compared([zero], [-zero]) == (3, 0.0)
    assert compared([nan], [nan.clone()]) is None
    assert compared([None, zero], [zero, zero]) is None
