"""The order in which FSDP2 gathers weights and sums gradients, and which sums a unit's backward waits for on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import parallel.engine
from parallel.fsdp.collectives import count_stream_waits
from parallel.fsdp.prefetch import keep_gradients_in_flight
from parallel.torch_internals import all_parameter_groups
from parallel.watchdog.spans import SPANS
from tests.support.pool import close_pools, pool
from tests.support.steppers import make_stepper
from tests.support.three_steps import MODEL
from train.checkpoint.state_hash import state_hash

BASE = [*MODEL, "model.num_layers=3", "train.dtype=bfloat16"]
LAYOUTS = {  # of one micro-batch a step, and the groups of parameters of an MTP layer and of the head
    "ep2": ([*BASE, "parallel.ep=2", "model.num_experts=4", "train.micro_batch_size=2"], 1),
    "tp2": ([*BASE, "parallel.tp=2", "train.micro_batch_size=4"], 2),
}
ROOT = "embedding, head and norm"


@pytest.fixture(scope="module", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()


def order_of_a_step(overrides: list[str]) -> list[str]:
    """The starts of gathers and sums of the second step, by group of parameters: `gather layers.1 0`."""
    stepper = make_stepper(overrides)
    model = stepper.state.models[0]
    assert stepper.step().healthy  # FSDP2 learns names and order
    starts: list[str] = []

    def watch(group: Any) -> None:
        name = f"{group._module_fqn or ROOT} {group._param_group_index}"
        unshard, post_backward = group.unshard, group.post_backward

        def gather(async_op: bool = False) -> None:
            if group._all_gather_result is None and not group.is_unsharded:
                starts.append(f"gather {name}")
            unshard(async_op)

        def end_backward(*unused: Any) -> None:
            if any(one.sharded_param.requires_grad and hasattr(one, "_unsharded_param") for one in group.fsdp_params):
                starts.append(f"sum {name}")
            post_backward(*unused)

        group.unshard, group.post_backward = gather, end_backward

    for group in all_parameter_groups(model):
        watch(group)
    assert stepper.step().healthy
    return starts


def expected_order(groups: int, mtp: bool) -> list[str]:
    """All of a layer is asked for before the layer above it sends its gradients; a layer's last group first."""
    chain = [[f"layers.{number} 0", f"layers.{number} 1", f"layers.{number}.mlp.router 0"] for number in range(3)]
    root = [f"{ROOT} {group}" for group in range(groups)]
    if mtp:
        chain.append([f"mtp.layers.0 {group}" for group in range(groups)])

    def backward(units: list[str]) -> list[str]:
        layer, router = [one for one in units if "router" not in one], [one for one in units if "router" in one]
        return layer[::-1] + router

    found = [f"gather {unit}" for units in (root, *chain, backward(chain[-1])) for unit in units]
    while chain:
        units = chain.pop()
        found += [f"gather {unit}" for unit in backward(chain[-1] if chain else [])]
        found += [f"sum {unit}" for unit in reversed(units)]
    return [*found, *(f"sum {unit}" for unit in reversed(root))]


@pytest.mark.parametrize("mtp", [True, False], ids=["mtp", "late_mtp"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_gathered_ahead_of_gradients(layout: str, mtp: bool) -> None:
    """In the forward too; and nothing is gathered for MTP layers that do not run."""
    overrides, groups = LAYOUTS[layout]
    late = [] if mtp else ["loss.mtp_start_tokens=100000"]
    for found in pool(2).run(order_of_a_step, [*overrides, *late]):
        ran = [one for one in found if mtp or not one.startswith("sum mtp")]  # FSDP2 ends all units' backwards
        assert ran == expected_order(groups, mtp)


def gathers_waited(overrides: list[str]) -> int:
    """Units whose gathered weights nobody has taken, after steps with and without MTP and an evaluation."""
    stepper = make_stepper([*overrides, "loss.mtp_start_tokens=64"])
    model = stepper.state.models[0]
    for _ in range(3):
        assert stepper.step().healthy
    batches = list(stepper.reader.read(stepper.state.counters.position))
    stepper.state.engine.evaluate(batches)
    return sum(group._all_gather_result is not None for group in all_parameter_groups(model))


def test_no_gathered_weights_are_left_over() -> None:
    """They would be used after the next update."""
    assert pool(2).run(gathers_waited, LAYOUTS["ep2"][0]) == [0, 0]


def bits_after_steps(overrides: list[str], ahead: bool) -> str:
    plain = parallel.engine.prefetch_in_order
    try:
        if not ahead:
            parallel.engine.prefetch_in_order = lambda *_: None  # type: ignore[assignment]
        stepper = make_stepper(overrides)
        for _ in range(2):
            assert stepper.step().healthy
        return state_hash(stepper.state, stepper.topology)
    finally:
        parallel.engine.prefetch_in_order = plain


def test_prefetch_changes_no_bit() -> None:
    overrides = [*MODEL, "parallel.ep=2", "model.num_experts=4", "train.dtype=bfloat16"]
    assert pool(2).run(bits_after_steps, overrides, True) == pool(2).run(bits_after_steps, overrides, False)


def waits_of_a_backward(overrides: list[str], raised: bool) -> list[tuple[str, str]]:
    """(unit whose backward ends, unit whose sum the compute stream then waits for), as on a GPU."""
    stepper = make_stepper(overrides)
    model = stepper.state.models[0]
    if raised:
        keep_gradients_in_flight(model)
    units: dict[int, str] = {}  # of the inputs of sums in progress
    waits: list[tuple[str, str]] = []

    def watch(group: Any) -> Callable[..., None]:
        plain = group.post_backward

        def post_backward(*unused: Any) -> None:
            before = list(group.comm_ctx.reduce_scatter_states)
            plain(*unused)
            after = list(group.comm_ctx.reduce_scatter_states)
            kept = {id(state) for state in after}
            waits.extend((group._module_fqn, units[id(state)]) for state in before if id(state) not in kept)
            known = {id(state) for state in before}
            units.update({id(state): group._module_fqn for state in after if id(state) not in known})

        return post_backward

    stepper.step()  # FSDP2 learns the order and the names
    for group in all_parameter_groups(model):
        group.post_backward = watch(group)
    assert stepper.step().healthy
    return waits


def test_a_router_does_not_stop_the_compute() -> None:
    """By default its sum waits for the dense gradients of the layer above, which have just been sent."""
    overrides = [*LAYOUTS["ep2"][0], "model.num_mtp_layers=0"]
    just_sent = ("layers.1.mlp.router", "layers.2")
    for waits in pool(2).run(waits_of_a_backward, overrides, False):
        assert just_sent in waits
    for waits in pool(2).run(waits_of_a_backward, overrides, True):
        assert waits
        assert just_sent not in waits
        assert ("layers.0.mlp.router", "layers.2") in waits  # a whole layer later


class Clock:
    """Counts the waits of a compute stream, in place of a GPU's clock."""

    def __init__(self) -> None:
        self.depth = self.waits = 0

    def enter(self) -> None:
        assert self.depth == 0, "a wait is counted twice"
        self.depth += 1
        self.waits += 1

    def leave(self) -> None:
        self.depth -= 1

    def take(self) -> float:
        return 0.0


def counted_waits(overrides: list[str]) -> tuple[int, int]:
    """Waits of a step that the clock counts, and those for gathered weights among them."""
    stepper = make_stepper(overrides)
    model = stepper.state.models[0]
    count_stream_waits(model)
    assert stepper.step().healthy
    gathers = [0]

    def watch(group: Any) -> None:
        wait = group.wait_for_unshard

        def counted() -> None:
            before = clock.waits
            wait()
            gathers[0] += clock.waits - before

        group.wait_for_unshard = counted

    for group in all_parameter_groups(model):
        watch(group)
    SPANS.stream_clock = clock = Clock()
    try:
        assert stepper.step().healthy
    finally:
        SPANS.stream_clock = None
    assert clock.depth == 0
    return clock.waits, gathers[0]


def test_waits_of_fsdp_are_exposed_communication() -> None:
    """For weights in forward and backward, and for sums at the end, each once."""
    groups = 3 * 3 + 1 + 1  # a layer's groups and router; the MTP layer, the rest
    for waits, gathers in pool(2).run(counted_waits, LAYOUTS["ep2"][0]):
        assert gathers >= 2 * groups - 1  # the rest stays gathered
        assert waits >= gathers + groups
