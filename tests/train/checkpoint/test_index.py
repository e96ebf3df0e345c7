"""Each element of a checkpoint is written by one rank, which knows so without the others; the index lists them all.

What fails on one rank, all ranks learn.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.storage import WriteResult

from longcat.errors import ConfigError, SaveError
from longcat.names import Box
from parallel.torch_internals import record_place
from tests.support.distributed import run_ranks
from tests.support.running import TINY, trained_state
from train.checkpoint import save as saving
from train.checkpoint.dcp_tensors import DcpTensor, saved
from train.checkpoint.index import Entries, Placement, entries, items_to_write, num_bytes, write_index
from train.checkpoint.load import load
from train.checkpoint.save import save
from train.checkpoint.shards import ShardReader
from train.run_dir.folder import as_mapping

ALONE = Placement(replica=0, replicas=1, first_of_stage=True, first=True)
SIZES = (7, 1, 3, 12, 2, 2, 9)  # rows of tensors


def boxed(rows: int, start: int, stop: int) -> DcpTensor:
    box: Box = ((start, stop), (0, 4))
    return DcpTensor(
        (rows, 4), [(box, torch.arange(start * 4, stop * 4, dtype=torch.float32).view(-1, 4))], torch.float32
    )


def tensors_of(shard: int) -> dict[str, Tensor]:
    """What a rank with the first or the second half of each tensor has."""
    found: dict[str, Tensor] = {}
    for number, rows in enumerate(SIZES):
        half = rows // 2
        found[f"weight/{number}"] = boxed(rows, 0, half) if shard == 0 else boxed(rows, half, rows)
        found[f"optimizer_step/{number}"] = torch.tensor(5.0)
    return found | {"bias/0": torch.ones(3)}


def results_of(items: list[Any]) -> list[WriteResult]:
    return [WriteResult(item.index, 8, record_place("__0_0.distcp", 8 * n, 8)) for n, item in enumerate(items)]


def test_ranks_with_the_same_boxes_share_them() -> None:
    kept = [items_to_write(tensors_of(1), replace(ALONE, replica=replica, replicas=3)) for replica in range(3)]
    sharded = [[item for item in items if item.index.fqn.startswith("weight")] for items in kept]
    everything = sorted(item.index.fqn for items in sharded for item in items)
    assert everything == sorted(f"weight/{number}" for number in range(len(SIZES)))
    taken = [sum(map(num_bytes, items)) for items in sharded]
    largest = max(num_bytes(item) for items in sharded for item in items)
    assert max(taken) - min(taken) <= largest


def test_what_all_have_is_written_once() -> None:
    """Step counts by the first rank of a pipeline stage, the rest by the first rank of all."""
    first, of_stage, other = ALONE, replace(ALONE, first=False), replace(ALONE, first=False, first_of_stage=False)
    kinds = [
        {item.index.fqn.partition("/")[0] for item in items_to_write(tensors_of(0), at)}
        for at in (first, of_stage, other)
    ]
    assert kinds == [{"weight", "optimizer_step", "bias"}, {"weight", "optimizer_step"}, {"weight"}]


def parts() -> list[Entries]:
    places = [ALONE, replace(ALONE, first_of_stage=False, first=False)]
    found = []
    for shard, place in enumerate(places):
        items = items_to_write(tensors_of(shard), place)
        found.append(entries(tensors_of(shard), items, results_of(items)))
    return found


def test_tensor_that_no_rank_writes_is_no_checkpoint(tmp_path: Path) -> None:
    """Each of two replicas takes the other's turn, so no rank writes their tensor."""
    tensors: dict[str, Tensor] = {"weight/0": boxed(3, 0, 3)}
    nothing = entries(tensors, items_to_write(tensors, replace(ALONE, replica=1, replicas=2)), [])
    with pytest.raises(ValueError, match="weight/0: 0 boxes of 0 values in all were written for 12"):
        write_index([nothing, nothing], tmp_path)


def test_a_gap_or_a_box_written_twice_is_no_checkpoint(tmp_path: Path) -> None:
    whole = parts()
    write_index(whole, tmp_path)
    for wrong in (whole[:1], [*whole, whole[1]]):
        with pytest.raises(ValueError, match=r"weight/0: . boxes of \d+ values in all were written for 28"):
            write_index(wrong, tmp_path)


def save_and_read(folder: Path, words: list[str]) -> list[str]:
    """Keys whose values torch's own reader does not find. Saving sends no list from the first rank to another one."""
    state, topology, config = trained_state([*TINY, "model.num_experts=4", "train.global_batch_size=8", *words], 1)
    with patch.object(dist, "scatter_object_list", None), patch.object(dist, "broadcast_object_list", None):
        path = save(state, folder, as_mapping(config), topology)
    dist.barrier()
    tensors = saved(state)
    plain = {key: torch.full(one.shape, -1, dtype=one.dtype) for key, one in tensors.items()}
    dcp.load(plain, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    wrong = []
    for key, one in tensors.items():
        boxes = one.boxes.items() if isinstance(one, DcpTensor) else [(torch.Size([0] * one.dim()), (one.shape, one))]
        for offset, (size, values) in boxes:
            cut = plain[key][tuple(slice(start, start + length) for start, length in zip(offset, size, strict=True))]
            if not torch.equal(cut, values):
                wrong.append(key)
    dist.destroy_process_group()
    return wrong


@pytest.mark.parametrize(
    "words",
    [["parallel.dp=2"], ["parallel.ep=2"], ["parallel.pp=2", "model.num_layers=4"], ["parallel.sharding=zero1"]],
    ids=str,
)
def test_torchs_reader_finds_every_value(words: list[str], tmp_path: Path) -> None:
    assert run_ranks(save_and_read, 2, tmp_path, words) == [[], []]


def failing(plain: Callable[..., Any], on: int, error: Exception, times: int = 2) -> Callable[..., Any]:
    """``plain``, which on one rank raises ``error`` the first ``times`` times."""
    left = [times if dist.get_rank() == on else 0]

    @wraps(plain)  # torch asks for the signature
    def call(*arguments: Any, **named: Any) -> Any:
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return plain(*arguments, **named)

    return call


def fail_on_one_rank(folder: Path) -> list[str]:
    """What this rank says of saves and loads that fail on one rank, and what is left of the saves."""
    state, topology, config = trained_state(TINY, 1)
    said: list[str] = []
    full, torn = OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "Input/output error")
    for plain, rank, error in [
        (items_to_write, 1, full),
        (items_to_write, 0, ZeroDivisionError("a bug")),
        (write_index, 0, full),
    ]:
        with patch.object(saving, plain.__name__, failing(plain, rank, error)), pytest.raises(SaveError) as caught:
            save(state, folder, as_mapping(config), topology)
        dist.barrier()  # the first rank removes what is there
        said.append(f"{caught.value} {caught.value.is_disk_full} {[path.name for path in folder.iterdir()]}")
        dist.barrier()
    path = save(state, folder, as_mapping(config), topology)
    plain_index, plain_data = ShardReader.read_metadata, ShardReader.read_data
    for torn_index, error in [(True, torn), (False, torn), (False, ZeroDivisionError("a bug"))]:
        with (
            patch.object(ShardReader, "read_metadata", failing(plain_index, 1, torn, int(torn_index))),
            patch.object(ShardReader, "read_data", failing(plain_data, 1, error)),
            pytest.raises(ConfigError) as refused,
        ):
            load(state, path, as_mapping(config))
        said.append(str(refused.value))
    dist.destroy_process_group()
    return said


def test_all_ranks_learn_what_fails_on_one(tmp_path: Path) -> None:
    """Of a save nothing is left."""
    first, second = run_ranks(fail_on_one_rank, 2, tmp_path)
    unsaved = "the checkpoint of step 1 is not saved:"
    unread = f"checkpoint {tmp_path / 'step-00000001'} could not be read: rank 1:"
    advice = "; restore its files or name another"
    assert first == second
    assert first == [
        f"{unsaved} rank 1: No space left on device True []",
        f"{unsaved} rank 0: ZeroDivisionError: a bug False []",
        f"{unsaved} rank 0: No space left on device True []",
        f"{unread} Input/output error{advice}",
        f"{unread} Input/output error{advice}",
        f"{unread} ZeroDivisionError: a bug{advice}",
    ]
