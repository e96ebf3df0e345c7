"""A whole step on fake CUDA tensors: where its tensors are, what the host waits for, which collectives it starts."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from tests.rehearsal.kernels import without_cuda_kernel
from tests.rehearsal.run import Found, differences, first_difference, rehearsals
from tests.support.distributed import ROOT

STEP = ["train.dtype=bfloat16", "train.micro_batch_size=1", "run.name=rehearsal", "sdc.every=0"]
TINY = ["model=tiny", *STEP]
FLASH = ["model=flash", *STEP]
SINGLE = {"overrides": [*TINY, "model.num_layers=2", "train.global_batch_size=2", "data.mask_documents=true"]}
EIGHT = {
    "overrides": [*TINY, "model.num_layers=1", "train.global_batch_size=4", "parallel.tp=2", "parallel.ep=4"],
    "world_size": 8,
    "ranks": [0, 1, 2, 3],  # they share an expert group, and by twos a tensor-parallel one
}
LARGE = {
    "overrides": [*FLASH, "model.num_layers=1", "train.global_batch_size=512", "parallel.tp=4", "parallel.ep=64"],
    "world_size": 2048,
    "ranks": [76, 77],
    "length": 4096,
}
COPIES_OF_A_STEP = {"to in reduce.py:to_host": 2}
SIZES = "copy in streams.py:to_host"  # of rows that a layer sends: one copy for each micro-batch
WRITES_BY_INDEX = {"cross_entropy.py:_chunk_loss", "tensor.py:_chunk_loss"}  # the head's, outside the layers
WAIT = "event in streams.py:wait"


def check(found: Found, layers_and_micro_batches: int) -> None:
    """One copy for each layer and micro-batch, two for the step, and nothing that a GPU would refuse or wait for."""
    assert found["copies"] == {SIZES: layers_and_micro_batches, **COPIES_OF_A_STEP}
    assert found["waits"] == {WAIT: layers_and_micro_batches}
    for name in ("pageable", "refused", "no_kernel", "misplaced"):
        assert found[name] == {}, name
    assert without_cuda_kernel(found["operators"]) == set()
    assert {one.split(" in ")[1] for one in found["sorting"]} <= WRITES_BY_INDEX


def of_kind(found: Found, operator: str, ranks: list[int]) -> list[str]:
    """The collectives of one kind in all groups of these ranks."""
    members = " of " + ",".join(map(str, ranks))
    return [
        one
        for key, all_of in found["collectives"].items()
        if key.endswith(members)
        for one in all_of
        if operator in one
    ]


@pytest.fixture(scope="module")
def quick() -> list[dict[int, Found]]:
    return rehearsals([SINGLE, EIGHT, LARGE])


def test_one_gpu(quick: list[dict[int, Found]]) -> None:
    """A tiny model's step with document masks: flash attention, grouped products and fused AdamW run on the device."""
    found = quick[0][0]
    check(found, 2 * 2)
    expected = {"aten::_flash_attention_forward", "aten::_grouped_mm", "longcat::plan", "aten::_fused_adamw_"}
    expected |= {"longcat::norm_rows_backward", "longcat::gate_rows_backward", "longcat::keys_and_values_backward"}
    assert expected <= found["operators"].keys()
    assert not found["collectives"] and not found["messages"]


def test_eight_gpus_start_the_same_collectives(quick: list[dict[int, Found]]) -> None:
    found = quick[1]
    for one in found.values():
        check(one, 1)
    assert differences(found) == []
    # Sizes of rows; dispatch and combine, forward and backward; gradients of gates
    assert len(of_kind(found[3], "alltoall", [0, 1, 2, 3])) == 1 + 4 + 1
    # Two sums a step over all ranks, which no other collective of their kind joins
    assert [one.split("[")[0] for one in of_kind(found[3], "allreduce_", list(range(8)))] == ["allreduce_ float64"] * 2


def test_flash_layer_among_2048_gpus(quick: list[dict[int, Found]]) -> None:
    found = quick[2]
    for one in found.values():
        check(one, 1)
    assert differences(found) == []
    assert len(of_kind(found[77], "alltoall", list(range(64, 128)))) == 1 + 4 + 1
    assert len(of_kind(found[77], "allreduce_ float64", list(range(2048)))) == 2


def test_differences_are_found() -> None:
    """Another order in one group, a collective that a rank leaves out, and messages that do not meet."""
    alike: Found = {"collectives": {"0 of 0,1": ["a", "b"]}, "messages": {"0>1": ["x"]}}
    assert differences({0: alike, 1: alike}) == []
    swapped: Found = {"collectives": {"0 of 0,1": ["b", "a"]}, "messages": {"0>1": ["x"]}}
    assert differences({0: alike, 1: swapped}) == ["collectives 0 of 0,1: number 0 is {0: 'a', 1: 'b'}"]
    silent: Found = {"collectives": {"0 of 0,1": ["a"]}, "messages": {}}
    assert len(differences({0: alike, 1: silent})) == 2
    assert first_difference({0: ["a", "b"], 1: ["a"]}) == "number 1 is {0: 'b', 1: 'nothing'}"


def test_operators_without_a_kernel_are_found() -> None:
    names = ["aten::mkldnn_linear", "aten::add.Tensor", "aten::_grouped_mm", "aten::sum.dim_IntList"]
    assert without_cuda_kernel(names) == {"aten::mkldnn_linear"}


COPIES_TO_THE_DEVICE = """
from tests.rehearsal.device import load
load()
import torch
from longcat.ops.torch_internals import fake_tensor_mode
from tests.rehearsal.recorder import Recorder
recorder, pageable = Recorder(), torch.ones(8)
pinned = pageable.pin_memory()
assert pinned.is_pinned() and pinned[3:].is_pinned() and not pageable.is_pinned()
with fake_tensor_mode(), recorder:
    target = torch.empty(8, device="cuda:0")
    counts = []
    for copy in (
        lambda: pinned.to("cuda:0", non_blocking=True),
        lambda: target[3:].copy_(pinned[3:], non_blocking=True),
        lambda: pageable.to("cuda:0", non_blocking=True),
        lambda: target.copy_(pageable, non_blocking=True),
        lambda: target.copy_(pinned),
        lambda: pageable[0].to("cuda:0", non_blocking=True),
    ):
        before = sum(recorder.found.pageable.values())
        copy()
        counts.append(sum(recorder.found.pageable.values()) - before)
print(counts)
"""


def test_copies_that_the_host_waits_for_are_counted() -> None:
    """A copy from pageable memory waits, however it is asked for; one from pinned memory only if it is not told."""
    done = subprocess.run([sys.executable, "-c", COPIES_TO_THE_DEVICE], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[0, 0, 1, 1, 1, 1]"


BATCH = "train.global_batch_size=16"
LAYOUTS: dict[str, list[str]] = {
    "cp2_tp2_ep8": ["parallel.cp=2", "parallel.tp=2", "parallel.ep=8"],
    "cp2_documents": ["parallel.cp=2", "data.mask_documents=true"],
    "all_gather": ["parallel.ep=8", "parallel.transport=all_gather"],
    "dp2_ep2": ["parallel.dp=2", "parallel.ep=2"],
    "pp2_ep2": ["parallel.pp=2", "parallel.ep=2"],
    "pp2_1f1b_tp2": ["parallel.pp=2", "parallel.tp=2", "parallel.schedule=1f1b"],
    "chunks": ["parallel.ep=8", "overlap.num_chunks=2", "overlap.experts_stream=true"],
    "selective": ["parallel.ep=2", "parallel.recompute=selective"],
}


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_eight_gpus(layout: str) -> None:
    overrides = [*TINY, "model.num_layers=4", BATCH, *LAYOUTS[layout]]
    job: dict[str, Any] = {"overrides": overrides, "world_size": 8, "ranks": list(range(8)), "length": 64}
    (found,) = rehearsals([job], timeout=3000)
    assert differences(found) == []
    for one in found.values():
        check(one, one["copies"][SIZES])  # a pipeline's ranks have different numbers of layers


@pytest.mark.long
def test_whole_flash_step() -> None:
    """28 layers and MTP, pipelined over 8 stages of 256 GPUs: the first, an inner and the last stage."""
    overrides = [*FLASH, "train.global_batch_size=1024", "parallel.pp=8", "parallel.tp=4", "parallel.ep=64"]
    job = {"overrides": overrides, "world_size": 2048, "ranks": [0, 256, 1792], "length": 8192}
    alone = {"overrides": [*FLASH, "train.global_batch_size=1"], "length": 8192}
    found, single = rehearsals([job, alone], timeout=6000)
    assert differences(found) == []
    for one in found.values():
        check(one, one["copies"][SIZES])
    check(single[0], 28)


@pytest.mark.long
def test_checks_for_corruption_wait_a_few_times() -> None:
    """With `sdc.every`: digests come in one copy each time, not one for each tensor."""
    overrides = ["model=debug", *STEP, "sdc.every=1", "train.global_batch_size=8", "parallel.ep=2"]
    (found,) = rehearsals([{"overrides": overrides, "world_size": 8, "ranks": [3]}])
    print(found[3]["copies"])
    assert sum(found[3]["copies"].values()) < 40


@pytest.mark.long
def test_checks_of_transfers_hardly_grow_with_owners() -> None:
    """Of the weights of a layer: 64 owners, and 512, whose parts are shorter than a row more often."""
    checks = ["sdc.every=1", "sdc.at_rest=false", "sdc.replay_every=0"]
    kept = [*FLASH, *checks, "model.num_layers=1", "parallel.tp=4", "parallel.ep=64"]
    totals = []
    for ranks in (256, 2048):
        overrides = [*kept, f"train.global_batch_size={ranks // 4}"]
        (found,) = rehearsals([{"overrides": overrides, "world_size": ranks, "ranks": [76], "length": 4096}])
        totals.append(sum(found[76]["operators"].values()))
    assert totals[1] < 1.2 * totals[0]
