"""The formula for what a step keeps beside the state, against what FSDP2 keeps on two ranks; gradients in shards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from longcat.errors import ConfigError
from parallel.fsdp.collectives import parameter_groups
from parallel.fsdp.prefetch import keep_gradients_in_flight
from parallel.fsdp.sharding import local_part
from parallel.layout import check_layout
from parallel.memory import FLOAT32, StepBytes, in_a_step, step_bytes
from parallel.sizes import resolve_sizes
from parallel.torch_internals import initialize_root
from tests.support.comparison import check, compare, one_process
from tests.support.measure import measure
from tests.support.pool import close_pools, pool
from tests.support.steppers import make_stepper
from tests.support.three_steps import MODEL
from train.compose import compose

BASE = [*MODEL, "model.num_layers=3", "model.vocab_size=112", "model.num_experts=4", "train.global_batch_size=8"]
LAYOUTS = {
    "ep2-bfloat16": ["parallel.ep=2", "train.dtype=bfloat16"],
    "ep2-sharded": ["parallel.ep=2", "train.dtype=bfloat16", "parallel.accumulate=sharded"],
    "ep2-float32-no_mtp": ["parallel.ep=2", "model.num_mtp_layers=0"],
    "tp2-bfloat16": ["parallel.tp=2", "train.dtype=bfloat16"],
    "tp2-ep2-gathered": ["parallel.tp=2", "parallel.ep=2", "parallel.reshard_after_forward=false"],
    "one_micro_batch": ["parallel.fsdp=2", "train.dtype=bfloat16", "train.micro_batch_size=4"],
    "pp2-zbv": ["parallel.pp=2", "parallel.schedule=zbv", "model.num_layers=4", "train.dtype=bfloat16"],
}


@pytest.fixture(scope="module", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()


def formula(overrides: list[str], parts: Any) -> StepBytes:
    config = compose(overrides)
    sizes = resolve_sizes(config.parallel, 2)
    micro_batches = config.train.global_batch_size // config.train.micro_batch_size // sizes.data_ranks
    compute = FLOAT32 if config.train.dtype == "float32" else 2
    return step_bytes(config.model, sizes, config.parallel, parts, micro_batches, compute)


def kept_gradient(parameter: Any) -> float:
    """Bytes of the float32 gradient of an unsharded weight."""
    grad = parameter.unsharded_accumulated_grad
    if grad is None and hasattr(parameter, "_unsharded_param"):
        grad = parameter._unsharded_param.grad
    if grad is None or grad.dtype != torch.float32:
        return 0.0
    return float(local_part(grad)[0].nbytes)


def measured(overrides: list[str]) -> tuple[StepBytes, StepBytes]:
    """The largest bytes of each kind that FSDP2 kept in a step, as on a GPU, and the formula's."""
    stepper = make_stepper(overrides)
    models = stepper.state.models
    for model in models:
        keep_gradients_in_flight(model)
        for group in parameter_groups(model):  # the number is read when a model runs for the first time
            group.comm_ctx.reduce_scatter_max_input_buffers = group.reduce_scatter_max_input_buffers
        initialize_root(model)
    groups = [group for model in models for group in parameter_groups(model)]
    most = [0.0, 0.0, 0.0]

    def gathered(group: Any) -> float:
        if group._all_gather_result is not None and not group.is_unsharded:
            weights = (weight for one in group.fsdp_params for weight in one.all_gather_inputs)
            return float(sum(weight.nbytes for weight in weights) * group._all_gather_process_group.size())
        if not group.is_unsharded:
            return 0.0
        return float(sum(out.untyped_storage().nbytes() for one in group.fsdp_params for out in one.all_gather_outputs))

    def look() -> None:
        contexts = {id(group.comm_ctx): group.comm_ctx for group in groups}
        grads = [kept_gradient(one) for group in groups for one in group.fsdp_params]
        inputs = [state[0] for context in contexts.values() for state in context.reduce_scatter_states]
        now = (
            sum(gathered(group) for group in groups),
            float(sum(grads)),
            float(sum(one.nbytes for one in inputs)),
        )
        most[:] = [max(pair) for pair in zip(most, now, strict=True)]

    def watched(plain: Callable[..., None]) -> Callable[..., None]:
        def call(*arguments: Any) -> None:
            plain(*arguments)
            look()

        return call

    for group in groups:
        group.unshard, group.wait_for_unshard = watched(group.unshard), watched(group.wait_for_unshard)
        group.post_backward = watched(group.post_backward)
    assert stepper.step().healthy
    stepper.state.engine.close()
    return StepBytes(*most), formula(overrides, [model.part for model in models])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_formula_equals_what_fsdp_keeps(layout: str) -> None:
    for found, expected in pool(2).run(measured, [*BASE, *LAYOUTS[layout]]):
        assert found.gathered_weights == expected.gathered_weights
        assert found.accumulated_gradients == expected.accumulated_gradients
        if "pp2" not in layout:  # a pipeline sums all at the end
            assert found.sums_in_progress == expected.sums_in_progress


def test_gradients_in_shards_equal_one_process() -> None:
    """Each micro-batch reduced into shards, with replicas too; the step keeps no unsharded gradient (above)."""
    for layout in (["parallel.ep=2"], ["parallel.dp=2", "parallel.fsdp=1"]):
        ranks = pool(2).run(measure, [*layout, "parallel.accumulate=sharded"], 3, True)
        check(compare(ranks, one_process()))


def test_says_which_accumulation_is_chosen() -> None:
    config = compose([*BASE, "parallel.ep=2"])
    sizes = resolve_sizes(config.parallel, 2)
    said = in_a_step(config.model, sizes, config.parallel, [None], 4, "bfloat16")
    assert "accumulated gradients" in said
    assert said.endswith(
        "4 micro-batches add up before they are summed over the ranks; parallel.accumulate=sharded keeps none"
    )
    config = compose([*BASE, "parallel.ep=2", "parallel.accumulate=sharded"])
    said = in_a_step(config.model, sizes, config.parallel, [None], 4, "bfloat16")
    assert "accumulated gradients" not in said
    assert said.endswith("each of 4 micro-batches is summed over the ranks into shards")


def test_flash_figures() -> None:
    """The 44 GiB of whole gradients that no formula counted: pp 1, ep 64, tp 8."""
    overrides = ["model=flash", "parallel.tp=8", "parallel.ep=64", "train.global_batch_size=64"]
    config = compose([*overrides, "train.micro_batch_size=1"])
    sizes = resolve_sizes(config.parallel, 64)
    found = step_bytes(config.model, sizes, config.parallel, [None], 8, 2)
    assert 43 < found.accumulated_gradients / 2**30 < 45


def test_refuses_what_it_cannot_do() -> None:
    for overrides, ranks, said in (
        (["parallel.sharding=zero1"], 1, "needs parallel.sharding=fsdp"),
        (["parallel.pp=2"], 2, "parallel.pp=2: a pipeline reduces gradients once"),
    ):
        with pytest.raises(ConfigError, match=said):
            config = compose([*BASE, "parallel.accumulate=sharded", *overrides])
            sizes = resolve_sizes(config.parallel, ranks)
            check_layout(config.model, config.parallel, sizes, config.train.sequence_length, 4)
