"""With how many nodes a run can go on, and with which layout."""

from __future__ import annotations

import pytest

from launch.supervisor.layouts import layouts
from train.compose import compose

BASE = ["model=debug", "train.global_batch_size=8", "train.micro_batch_size=1"]


@pytest.mark.parametrize(
    ("words", "nodes", "processes", "expected"),
    [
        ([], 4, 1, {4: ""}),
        (["launch.shrink=true"], 4, 1, {4: "", 2: "1 2 1", 1: "1 1 1"}),  # 3 do not divide the batch
        (["launch.shrink=true", "parallel.dp=2"], 4, 1, {4: "", 2: "1 2 1", 1: "1 1 1"}),
        (["launch.shrink=true", "parallel.dp=4"], 4, 2, {4: "", 2: "2 2 1", 1: "1 2 1"}),
        (["launch.shrink=true", "parallel.ep=4"], 2, 2, {2: ""}),  # the experts need four ranks
        (["launch.shrink=true", "parallel.ep=2", "parallel.tp=2"], 2, 2, {2: "", 1: "1 1 2"}),
        (["launch.shrink=true", "parallel.tp=4"], 2, 2, {2: ""}),
        (["launch.shrink=true", "train.global_batch_size=6"], 3, 1, {3: "", 2: "1 2 1", 1: "1 1 1"}),
        (["launch.shrink=true", "train.elastic_bits=4"], 4, 1, {4: "", 2: "1 2 1", 1: "1 1 1"}),
    ],
)
def test_layouts_of_fewer_nodes(words: list[str], nodes: int, processes: int, expected: dict[int, str]) -> None:
    found = layouts(compose([*BASE, *words]), nodes, processes)
    assert {count: " ".join(word.partition("=")[2] for word in own) for count, own in found.items()} == expected
    assert list(found) == sorted(found, reverse=True)
