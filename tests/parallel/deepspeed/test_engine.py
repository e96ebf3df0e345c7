"""DeepSpeed's ZeRO beyond the parity tests: fp32 master weights, NVMe, flat ranges as boxes, and refusals."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longcat.errors import ConfigError
from parallel.config import Offload, ParallelConfig
from parallel.deepspeed import setup
from parallel.deepspeed.flat_partitions import FlatShard, boxes_of_range
from parallel.deepspeed.options import check as check_options
from parallel.mesh import resolve_sizes
from tests.parallel.deepspeed import file_aio
from tests.support.comparison import STEPS, check, compare, one_process
from tests.support.measure import Measured, assemble, measure
from tests.support.pool import close_pools, pool


@pytest.fixture(scope="module", autouse=True)
def _pools() -> Iterator[None]:
    yield
    close_pools()


@pytest.mark.parametrize("layout", ["sharding=zero1", "sharding=zero3"])
def test_fp32_master_weights_survive_bfloat16_training(layout: str) -> None:
    """DeepSpeed's own bf16 mode would initialise master weights from rounded weights."""
    ranks: list[Measured] = pool(2).run(measure, [f"parallel.{layout}", "train.dtype=bfloat16"], STEPS)
    expected = one_process()
    initial, wanted = assemble([rank.initial for rank in ranks]), assemble([expected.initial])
    for name, value in wanted.items():
        assert torch.equal(initial[name], value), f"{name} starts from other values"
    for kind in ("weights", "exp_avg", "exp_avg_sq"):
        for name, value in assemble([getattr(rank, kind) for rank in ranks]).items():
            value = value[value != 0]  # embedding rows without tokens
            rounded = (value.bfloat16().float() == value).double().mean()
            assert rounded < 0.2, f"{kind} of {name} looks rounded to bfloat16"


def with_nvme() -> tuple[Measured, int]:
    """Three steps with weights and moments in files, through a fake of libaio; and the number of files."""
    setup.PERSISTENT_NUMEL = 100  # some weights are sharded and some are persistent
    file_aio.install()
    with tempfile.TemporaryDirectory() as folder:
        keys = ["parallel.sharding=zero3", "parallel.offload=nvme", f"parallel.offload_path={folder}"]
        return measure(keys, STEPS), len(list(Path(folder).rglob("*.swp")))


def test_nvme_offload_equals_one_process() -> None:
    """libaio is replaced by a fake, so this does not test its speed."""
    found = pool(2).run(with_nvme)
    check(compare([measured for measured, _ in found], one_process()))
    assert all(files >= 10 for _, files in found), "weights and moments were left in memory"


def test_boxes_cover_a_range_in_order() -> None:
    for shape in ((7,), (3, 5), (3, 4, 5)):
        full = torch.arange(torch.Size(shape).numel(), dtype=torch.float32)
        for start in range(full.numel()):
            for stop in range(start, full.numel() + 1):
                shard = FlatShard("weight", "x", shape, start, full[start:stop])
                boxes = list(shard.boxes())
                assert len(boxes) <= 2 * len(shape) - 1
                for box, values in boxes:
                    index = tuple(slice(*edge) for edge in box)
                    assert torch.equal(full.view(shape)[index], values)
                assert sum(values.numel() for _, values in boxes) == stop - start
    assert list(boxes_of_range((3, 5), 4, 4)) == []


@pytest.mark.parametrize(
    "keys,world,cure",
    [
        ({"sharding": "zero1", "pp": 2}, 2, "set parallel.pp=1"),
        ({"sharding": "zero2", "tp": 2}, 2, "set parallel.tp=1"),
        ({"sharding": "zero3", "ep": 2}, 2, "parallel.sharding=zero2"),
        ({"sharding": "zero3", "recompute": "full"}, 2, "parallel.recompute=selective"),
        ({"sharding": "zero2", "offload": "nvme"}, 2, "parallel.offload=cpu"),
        ({"sharding": "zero3", "offload": "nvme", "offload_path": "/nowhere"}, 2, "parallel.offload_path"),
    ],
)
def test_what_deepspeed_cannot_do_is_refused_with_a_cure(keys: dict[str, Any], world: int, cure: str) -> None:
    config = ParallelConfig(**keys)
    with pytest.raises(ConfigError, match=cure) as refusal:
        check_options(config, resolve_sizes(config, world))
    assert refusal.value.exit_code == 2


def test_offload_without_deepspeed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set one of them"):
        ParallelConfig(offload=Offload.cpu).validate()
