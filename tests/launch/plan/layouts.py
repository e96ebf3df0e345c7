"""Layouts whose allocator peaks the planner must predict, chosen before any of them was measured.

Both sharding engines, every pipeline schedule, every recomputation, each axis of the mesh alone and together.
"""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """Ranks and what differs from `tests.launch.plan.allocations.COMMON`."""

    ranks: int
    overrides: tuple[str, ...]

    def __str__(self) -> str:
        names = [one.removeprefix("parallel.").removeprefix("train.").removeprefix("model.") for one in self.overrides]
        return ",".join([str(self.ranks), *names])


QUICK = (Layout(2, ("parallel.ep=2", "parallel.recompute=selective")),)
LAYOUTS = (
    Layout(1, ()),
    Layout(1, ("parallel.recompute=full", "train.micro_batch_size=1")),
    Layout(2, ("parallel.fsdp=2", "parallel.recompute=selective", "train.dtype=float32")),
    Layout(2, ("parallel.ep=2", "model.num_layers=3", "train.global_batch_size=16")),
    Layout(2, ("parallel.cp=2", "parallel.ep=2", "parallel.recompute=full")),
    Layout(2, ("parallel.tp=2", "parallel.ep=2")),
    Layout(2, ("parallel.dp=2", "parallel.fsdp=1")),
    Layout(4, ("parallel.tp=2", "parallel.cp=2", "parallel.ep=4", "parallel.recompute=selective")),
    Layout(2, ("parallel.pp=2", "parallel.schedule=zbv", "model.num_layers=6")),
    Layout(2, ("parallel.pp=2", "parallel.schedule=1f1b", "parallel.recompute=full", "model.num_layers=4")),
    Layout(2, ("parallel.pp=2", "parallel.schedule=interleaved", "model.num_layers=4", "model.num_mtp_layers=0")),
    Layout(4, ("parallel.pp=2", "parallel.ep=2", "parallel.schedule=zbv", "model.num_layers=4")),
    Layout(2, ("parallel.sharding=zero1", "parallel.ep=2")),
    Layout(2, ("parallel.sharding=zero2", "parallel.recompute=full")),
    Layout(2, ("parallel.sharding=zero2", "parallel.cp=2", "model.num_layers=3")),
)
