"""Sums over ranks: integers as integers, floats in float64, norms over unique shards in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.crumbs import crumb
from parallel.mesh import Topology
from parallel.sharding import local_part


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum a small tensor over all ranks, in place (over gloo when it lies on the CPU)."""
    if dist.get_world_size() > 1:
        with crumb("sum over all ranks"):
            dist.all_reduce(values)
    return values


def from_first_rank(value: Any) -> Any:
    """What the first rank says: ranks must not decide apart on what they see of a machine or a file system."""
    shared = [value]
    if dist.get_world_size() > 1:
        with crumb("word of the first rank"):
            dist.broadcast_object_list(shared, src=0)
    return shared[0]


def sum_scalars(values: list[float]) -> list[float]:
    """Sum Python floats over all ranks, in float64."""
    summed: list[float] = sum_over_ranks(torch.tensor(values, dtype=torch.float64)).tolist()
    return summed


def sum_together(*parts: Tensor) -> list[Tensor]:
    """Sum several float64 tensors over all ranks in one collective; shapes as they came."""
    flat = sum_over_ranks(torch.cat([part.double().cpu().flatten() for part in parts]))
    summed = flat.split([part.numel() for part in parts])
    return [one.view(part.shape) for one, part in zip(summed, parts, strict=True)]


def gradient_square(parameters: Iterable[torch.nn.Parameter], topology: Topology) -> Tensor:
    """This rank's share of ‖all gradients‖₂²: its unique shards in parameter order; replicas count once."""
    grads = [local_part(p.grad)[0] for p in parameters if p.grad is not None]
    if not grads or not topology.holds_first_replica:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(torch._foreach_norm(grads)).double().square().sum()


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor], topology: Topology) -> bool:
    """Whether every value of every rank's shards is finite; a collective."""
    norms = torch._foreach_norm([local_part(tensor.detach())[0] for tensor in tensors], float("inf"))
    bad = torch.zeros((), dtype=torch.int64)
    if norms:
        bad += int((~torch.isfinite(torch.stack([norm.float() for norm in norms]))).sum())
    return int(sum_over_ranks(bad)) == 0


@torch.no_grad()
def scale_gradients(parameters: Iterable[torch.nn.Parameter], factor: float) -> None:
    """Multiply every gradient by ``factor``, in place."""
    grads = [local_part(p.grad)[0] for p in parameters if p.grad is not None]
    torch._foreach_mul_(grads, factor)
