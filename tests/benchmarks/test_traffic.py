"""Bytes that elementwise operators move are counted as documented, and a `flash` layer moves at most half of them."""

from __future__ import annotations

import torch

from benchmarks.common import preset
from benchmarks.traffic import Traffic, layer_traffic

# Of expressions alone; the router's parts, which have a kernel in both counts, moved 0.24 GB more by then
FORWARD_BEFORE = 15.74e9


def test_bytes_of_operators() -> None:
    x, column = torch.empty(4, 6, device="meta"), torch.empty(4, 1, device="meta")
    with Traffic() as traffic:
        x.add(column.expand(4, 6))
        x.t().mul_(2.0)
        torch.mm(x, x.t())
        torch.mul(x, x, out=torch.empty_like(x))
        torch.empty_like(x).copy_(x)
    assert traffic.bytes == {"add": 4 * (24 + 4 + 24), "mul_": 4 * 48, "mul": 4 * 48, "copy_": 4 * 48}


def test_a_flash_layer_moves_at_most_half() -> None:
    config = preset("flash")
    before, now = (layer_traffic(config, 8192, one_pass) for one_pass in (False, True))
    assert now["backward"].total <= before["backward"].total / 2
    assert now["forward"].total <= FORWARD_BEFORE / 2
