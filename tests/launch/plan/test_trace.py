"""The planner's peaks against allocator bytes of real ranks, its FLOPs against a counter, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from launch.plan.trace import Scope, reaching_into, trace
from longcat.errors import ConfigError
from longcat.ops import rows
from longcat.ops.fp32_linear import fp32_linear
from longcat.ops.torch_internals import fake_tensor_mode
from parallel.plan.rates import Rates
from parallel.plan.recorder import OUTSIDE, AllocationRecorder
from parallel.plan.shapes import RoutingAssumption, shapes_only
from tests.launch.plan.allocations import COMMON, count_flops, mean_routing, traced
from tests.launch.plan.layouts import LAYOUTS, QUICK, Layout
from tests.launch.plan.peaks import compare
from tests.support.distributed import run_ranks
from train.compose import compose


@pytest.mark.parametrize(
    "layout", [*QUICK, *(pytest.param(layout, marks=pytest.mark.long) for layout in LAYOUTS)], ids=str
)
def test_peak_is_the_allocators(layout: Layout) -> None:
    """Each rank's, within 5 % above and 2 % below, given how its routers chose."""
    found = compare(layout)
    print(found)
    assert found.agrees, found


SPLIT = ("model.num_layers=1", "train.global_batch_size=4")


@pytest.mark.parametrize(
    "layout",
    [
        Layout(1, ("parallel.recompute=selective", "train.global_batch_size=2", "model.num_layers=1")),
        *(
            pytest.param(layout, marks=pytest.mark.long)
            for layout in (
                Layout(2, ("parallel.ep=2", *SPLIT)),
                Layout(2, ("parallel.tp=2", "parallel.ep=2", *SPLIT)),
                Layout(2, ("parallel.cp=2", "parallel.ep=2", "parallel.recompute=full", *SPLIT)),
                Layout(2, ("parallel.pp=2", "parallel.schedule=1f1b", "model.num_layers=2")),
                Layout(4, ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=zbv", "model.num_layers=4")),
            )
        ),
    ],
    ids=str,
)
def test_flops_are_the_counters(layout: Layout) -> None:
    """Each rank's step, recomputation included, by torch's counter; experts' rows are whole numbers of each."""
    counted = run_ranks(count_flops, layout.ranks, layout.overrides, timeout=600)
    ep = compose([*COMMON, *layout.overrides]).parallel.ep
    scopes = [mean_routing(counted, ep, rank) for rank in range(layout.ranks)]
    (planned,) = run_ranks(traced, 1, layout.overrides, layout.ranks, scopes, timeout=600)
    within = 1e-9 if layout.ranks == 1 else 2e-3
    assert [one.flops for one in planned] == pytest.approx([one.flops for one in counted], rel=within)


def test_imbalance_takes_memory() -> None:
    overrides = ["parallel.ep=2", "model.num_layers=1", "train.global_batch_size=4"]
    ((even, uneven),) = run_ranks(traced, 1, overrides, 2, [Scope(), Scope(imbalance=2.0)], timeout=600)
    assert uneven.state == even.state
    assert uneven.peak > even.peak
    assert uneven.flops > even.flops


def test_parts_of_weights_laid_end_to_end() -> None:
    assert reaching_into([4, 4, 4], 0, 2) == 8  # of 6 elements: the first weight and, whole, half of the second
    assert reaching_into([4, 4, 4], 1, 2) == 8
    assert reaching_into([6, 6], 1, 2) == 6


@pytest.mark.parametrize("override", ["parallel.sharding=zero3", "parallel.compile=true", "train.elastic_bits=2"])
def test_what_cannot_be_traced_is_refused(override: str) -> None:
    config = compose(["model=debug", "train.dtype=bfloat16", "train.global_batch_size=8", override])
    with pytest.raises(ConfigError, match="cannot trace it; plan with"):
        trace(config, 2)


def shapes(mode: Any) -> list[tuple[Any, ...]]:
    """What tells the results of some operators apart, each of them twice."""
    with mode:
        a, z = torch.empty(8, 4), torch.empty(4, 3, dtype=torch.complex64)
        found = [
            result
            for _ in range(2)
            for result in (
                *(z.clone(), z.conj().clone(), z.conj() * z, z.imag, z.imag.clone()),
                *(a.clone(), a.t().clone(), a[1:].clone(), a.t(), a[1:], a.bfloat16().clone()),
                *(a + 1, a.int() + 1, a.int() + 1.0, a.sum(0), a.sum(0, keepdim=True), torch.softmax(a, 1)),
            )
        ]
    return [(x.shape, x.stride(), x.dtype, x.storage_offset(), x.is_conj(), x.is_neg()) for x in found]


def test_quick_look_up_gives_torchs_shapes() -> None:
    quick = fake_tensor_mode()
    plain = type(quick).__mro__[1](allow_non_fake_inputs=True)
    assert shapes(quick) == shapes(plain)


def test_rate_of_a_product_is_that_of_what_it_multiplies() -> None:
    """bfloat16 operands, added up and returned in float32."""
    recorder = AllocationRecorder(Rates(bfloat16=1e6, float32=1.0, memory=float("inf")))
    with fake_tensor_mode(), recorder:
        a, b = (torch.empty(10, 10, dtype=torch.bfloat16) for _ in range(2))
        torch.mm(a, b, out_dtype=torch.float32)
    assert recorder.phases[OUTSIDE].seconds == pytest.approx(2000 / 1e6)


def test_a_gpus_router_multiplies_bfloat16_parts() -> None:
    """Three products forward and for the weight, six for the input; none at the rate of float32."""
    recorder, mode = AllocationRecorder(Rates(1e12, 1.0, float("inf"))), fake_tensor_mode()
    with shapes_only(RoutingAssumption(2.0), recorder, True), mode, recorder:
        x = torch.empty(64, 32, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(8, 32, requires_grad=True)
        fp32_linear(x, weight).sum().backward()
    work = recorder.phases[OUTSIDE]
    assert work.flops == 2 * 64 * 32 * 8 * (3 + 3 + 6) and work.seconds < 1


def test_sums_over_rows_are_one_kernel_on_a_gpu() -> None:
    """Their plain versions are many operators, each of which would count as a call."""
    inf = float("inf")
    recorder, mode = AllocationRecorder(Rates(inf, inf, inf, call=1.0)), fake_tensor_mode()
    with shapes_only(RoutingAssumption(2.0), recorder, True), mode, recorder:
        hidden = torch.empty(4096, 2048, dtype=torch.bfloat16)
        before = recorder.phases[OUTSIDE].seconds
        rows.dot_rows(hidden, hidden)
    assert recorder.phases[OUTSIDE].seconds - before == pytest.approx(1.0, abs=1e-9)
