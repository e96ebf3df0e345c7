"""Pipelines on gloo ranks compute what one process with the full model computes, in every schedule."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from longcat.errors import ConfigError
from parallel.pipeline.stages import num_stages, stages_of
from tests.parallel.pipeline.pipeline_cases import EVALUATED, Case, alone, run_cases
from tests.support.distributed import run_ranks

TWO = [
    *(Case(schedule, 2, documents=True, recompute=True) for schedule in ("1f1b", "interleaved", "zbv", "dualpipev")),
    Case("zbv", 2, mtp=False, layers=7),
    Case("zbv", 2, micro_batches=1, sharded=False),
    Case("1f1b", 2, micro_batches=3, sharded=False),
    Case("zbv", 2, dtype="bfloat16", micro_batches=6),
    Case("dualpipev", 2, mtp=False, dtype="bfloat16"),
]
FOUR = [
    Case("1f1b", 2, fsdp=2, micro_batches=2),
    Case("interleaved", 2, fsdp=2, micro_batches=2, documents=True),
    Case("zbv", 2, fsdp=2, micro_batches=3, recompute=True),
    Case("dualpipev", 2, fsdp=2, recompute=True),
    Case("1f1b", 2, dp=2, micro_batches=2),
    Case("zbv", 4, layers=9, micro_batches=8, recompute=True),
    Case("interleaved", 4, layers=8, micro_batches=3, mtp=False),
]
ALL = [*TWO, *FOUR]


def name(case: Case) -> str:
    words = [
        f"pp{case.pp}_{case.schedule}",
        f"dp{case.dp}",
        f"fsdp{case.fsdp}",
        f"layers{case.layers}",
        f"micro{case.micro_batches}",
    ]
    words += [word for word, on in [("mtp", case.mtp), ("masks", case.documents), ("recompute", case.recompute)] if on]
    return "-".join([*words, *([] if case.sharded else ["plain"]), *(["bf16"] if case.dtype != "float32" else [])])


@cache
def pool(world_size: int) -> list[list[dict[str, Any]]]:
    """All cases of this number of ranks, in one process group: [rank][case]."""
    return run_ranks(run_cases, world_size, TWO if world_size == 2 else FOUR, timeout=300)


def found(case: Case) -> list[dict[str, Any]]:
    """The results of each rank."""
    cases = TWO if case in TWO else FOUR
    return [rank[cases.index(case)] for rank in pool(case.pp * case.data_ranks)]


one_process = cache(alone)

exact = pytest.mark.parametrize("case", [case for case in ALL if case.dtype == "float32"], ids=name)
every = pytest.mark.parametrize("case", ALL, ids=name)
rounded = pytest.mark.parametrize("case", [case for case in ALL if case.dtype == "bfloat16"], ids=name)


def error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(value - reference) / torch.linalg.vector_norm(reference))


@exact
def test_gradients_equal_one_process(case: Case) -> None:
    reference = one_process(case)["grads"]
    seen = set()
    for rank in found(case):
        for grads in (*rank["grads"], *rank["again"]):  # `again`: after an evaluation in between
            for key, grad in grads.items():
                if not case.mtp and key not in reference:
                    pytest.fail(f"{key} has a gradient that one process has not")
                assert error(grad, reference[key]) <= 2e-6, key
            seen |= grads.keys()
    assert seen == reference.keys()


@exact
def test_losses_and_counts_equal_one_process(case: Case) -> None:
    """Each stage has the counts of its own layers; the stage with the head has the losses."""
    reference = one_process(case)["losses"]
    stages = num_stages(case.schedule, case.pp)
    for rank in found(case):
        mine = {stage: rank["losses"][stage] for stage in rank["losses"]}
        for number in range(case.micro_batches):
            full = reference[rank["first"] + number]
            for stage, losses in mine.items():
                if stage == stages - 1:
                    for key in ("lm", "mtp", "hidden_z", "hidden_norm", "token_losses"):
                        assert torch.allclose(losses[number][key], full[key], rtol=1e-5), key
                else:
                    assert float(losses[number]["lm"]) == 0
    by_data_rank = {(rank["first"], stage): losses for rank in found(case) for stage, losses in rank["losses"].items()}
    for place, full in enumerate(reference):
        first, number = place - place % case.micro_batches, place % case.micro_batches
        parts = [by_data_rank[first, stage][number] for stage in range(stages)]
        assert torch.equal(torch.cat([part["counts"] for part in parts]), full["counts"])
        assert torch.equal(torch.cat([part["ffn_experts"] for part in parts]), full["ffn_experts"])
        assert torch.allclose(torch.cat([part["balance_grad"] for part in parts]), full["balance_grad"])
        assert float(sum(part["balance"] for part in parts)) == pytest.approx(float(full["balance"]), rel=1e-5)


@exact
def test_evaluation_equals_one_process(case: Case) -> None:
    """With another number of micro-batches than in training; no unit stays gathered."""
    reference = one_process(case)["losses"]
    last = num_stages(case.schedule, case.pp) - 1
    evaluated = 0
    for rank in found(case):
        assert rank["gathered"] == 0
        for stage, losses in rank["evaluated"].items():
            assert len(losses) == min(EVALUATED, case.micro_batches)
            for number, one in enumerate(losses if stage == last else []):
                full = reference[rank["first"] + number]
                assert torch.allclose(one["lm"], full["lm"], rtol=1e-5)
                assert torch.allclose(one["token_losses"], full["token_losses"], rtol=1e-4, atol=1e-5)
                assert float(one["mtp"]) == 0
                evaluated += 1
    assert evaluated == case.data_ranks * min(EVALUATED, case.micro_batches)


@every
def test_forward_runs_once_per_micro_batch_twice_if_recomputed(case: Case) -> None:
    runs = case.micro_batches * (2 if case.recompute else 1)
    for rank in found(case):
        assert rank["calls"] == dict.fromkeys(rank["layers"], runs)


@every
def test_copies_of_the_embedding_keep_equal_gradients(case: Case) -> None:
    local_boxes = [
        (rank["first"], grads["model.embed_tokens.weight"])
        for rank in found(case)
        for grads in rank["grads"]
        if "model.embed_tokens.weight" in grads
    ]
    assert len(local_boxes) == 2 * case.data_ranks
    assert all(torch.equal(local_boxes[0][1], grad) for _, grad in local_boxes), "the copies would drift apart"
    replicas = [names for rank in found(case) for names in rank["replicas"]]
    assert sum(names == {"embed_tokens.weight"} for names in replicas) == case.data_ranks
    assert sum(not names for names in replicas) == len(replicas) - case.data_ranks


@rounded
def test_deferred_weight_gradients_lose_nothing_in_bfloat16(case: Case) -> None:
    """Each is rounded once, as without a pipeline, and accumulated in float32. The embedding's come from two copies."""
    for rank in found(case):
        for grads in (*rank["grads"], *rank["again"]):
            for key, grad in grads.items():
                limit = 1e-2 if "embed_tokens" in key else 2e-6
                assert error(grad, rank["reference"][key]) <= limit, key


def refuse_a_short_step() -> str:
    from parallel.config import ParallelConfig
    from parallel.mesh import connect
    from parallel.pipeline.engine import PipelineEngine

    topology = connect(ParallelConfig(pp=1, fsdp=1))
    try:
        PipelineEngine([], topology, "dualpipev", 1, (1, 1, 1), torch.float32)
    except ConfigError as refusal:
        return str(refusal)
    finally:
        torch.distributed.destroy_process_group()
    return ""


def test_too_few_micro_batches_are_refused_before_the_run() -> None:
    message = run_ranks(refuse_a_short_step, 1)[0]
    assert "parallel.schedule=dualpipev needs at least 2 micro-batches a rank" in message
    assert "raise train.global_batch_size or lower train.micro_batch_size" in message


def test_cases_cover_every_schedule_sharded_and_stored() -> None:
    """Every schedule has a case with sharding and one without recomputation."""
    for schedule in ("1f1b", "interleaved", "zbv", "dualpipev"):
        mine = [case for case in ALL if case.schedule == schedule]
        assert any(case.fsdp > 1 for case in mine) and any(case.recompute for case in mine), schedule
        assert all(stages_of(schedule, case.pp, 0)[0] == 0 for case in mine)
