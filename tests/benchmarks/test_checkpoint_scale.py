"""`python -m benchmarks.checkpoint_scale`: boxes of a stage's ranks are whole tensors, and both ways list the same."""

from __future__ import annotations

import math
from pathlib import Path

from benchmarks.checkpoint_scale import Boxes, by_torch, by_us, moved, number_of, reading, tensors_of
from train.checkpoint.dcp_tensors import DcpTensor
from train.checkpoint.shards import ShardReader

RANKS = 8
BOXES: Boxes = [
    ("weight/dense", (20, 3), ((0, 3), (0, 3))),  # of seven ranks, the last one with less
    ("weight/experts", (2, 8, 3), ((0, 2), (0, 1), (0, 3))),
    ("exp_avg/dense", (16, 3), ((0, 2), (0, 3))),
    ("weight/norm", (5,), ((0, 5),)),  # of the first alone
]


def test_boxes_of_all_ranks_are_the_tensor() -> None:
    for key, shape, box in BOXES:
        found = [own for place in range(RANKS) if (own := moved(shape, box, place)) is not None]
        assert len(found) == number_of(shape, box), key
        assert sum(math.prod(stop - start for start, stop in own) for own in found) == math.prod(shape), key


def test_both_ways_list_the_same_boxes(tmp_path: Path) -> None:
    tensors = [tensors_of(BOXES, place) for place in range(RANKS)]
    boxes = sum(isinstance(one, DcpTensor) for own in tensors for one in own.values())
    found = {}
    for name, save in (("torch", by_torch), ("ours", by_us)):
        (tmp_path / name).mkdir()
        costs = save(tensors, tmp_path / name)
        assert costs["first"] > 0 and costs["first_bytes"] > 0
        metadata = ShardReader(tmp_path / name).read_metadata()
        found[name] = {(index.fqn, index.offset) for index in metadata.storage_data}
        assert len(found[name]) == boxes + 3, "and the step counts of three weights"
    assert found["torch"] == found["ours"]
    assert reading(tmp_path / "ours")["file"] > 0
