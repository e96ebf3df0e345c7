"""A verdict that no rank's own checks explain."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longcat.errors import CorruptionError
from parallel.mesh import MeshSizes
from tests.support.running import NARROW, TINY, RandomSamples, exit_json, finish, program, trained_state
from train.batches import BatchReader
from train.sdc.guard import Guard
from train.step import Stepper


@pytest.mark.parametrize("column", [0, 3, 5, 6], ids=["at rest", "messages", "operators", "update"])
def test_sum_that_arrives_wrong_is_a_finding(column: int) -> None:
    """A flipped bit in the exchange itself, of which every rank's part is sound."""
    state, topology, config = trained_state(TINY, 0)
    try:
        reader = BatchReader(RandomSamples(config.train.sequence_length), config, topology)  # type: ignore[arg-type]
        stepper = Stepper(state, reader, config, topology)
        plain = stepper.guard.judge

        def flipped(rows: torch.Tensor) -> None:
            rows[0, column] += 1
            plain(rows)

        stepper.guard.judge = flipped  # type: ignore[method-assign]
        with pytest.raises(CorruptionError, match="the sum over ranks of the checks on rank 0") as raised:
            stepper.step()
        assert raised.value.details["finding"]["kind"] == "message"
        assert state.counters.step == 0
    finally:
        torch.distributed.destroy_process_group()


def test_corrupt_counts_end_both_ranks_with_code_5(overrides: list[str], tmp_path: Path) -> None:
    """One rank alone knows, in the middle of a step; the other waits for it and is ended."""
    words = [*overrides, *NARROW, "train.steps=4", "run.num_processes=2", "parallel.fsdp=2", "parallel.ep=2"]
    fault = "sdc.inject='payload/bits/step:3/rank:1/name:expert counts'"
    code, errors = finish(program("launch", "train", *words, fault))
    assert code == 5, errors
    assert errors.count("silent data corruption in step 3: expert counts, layer 0 on rank 0 (") == 1
    record = exit_json(tmp_path / "run")
    assert record["code"] == 5 and [one["rank"] for one in record["finding"]["suspects"]] == [0, 1]


def test_replicas_are_the_ranks_that_differ_in_dp_alone() -> None:
    guard = Guard.__new__(Guard)
    guard.state = SimpleNamespace(store=SimpleNamespace(has_replicas=True))  # type: ignore[assignment]
    sizes = MeshSizes(dp=2, fsdp=3, cp=1, tp=2, pp=2, ep=1)
    guard.topology = SimpleNamespace(sizes=sizes)  # type: ignore[assignment]
    groups = [[rank, rank + 6] for stage in (0, 12) for rank in range(stage, stage + 6)]
    assert guard._by_replica(torch.arange(24)).tolist() == groups
    totals = torch.arange(24, dtype=torch.float64) % 6
    assert not guard._split(totals)
    totals[13] += 1
    assert guard._split(totals)
