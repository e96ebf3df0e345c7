"""Weights, moments and gradients of this rank: the interface of a sharding engine, and FSDP2's with torch's AdamW."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longcat.documents import to_device
from longcat.model import LongCat
from longcat.names import OTHER_PARTS, Box, part_number
from longcat.roles import role
from parallel.fsdp.sharding import local_part
from parallel.memory import StateBytes
from parallel.mesh import Topology
from parallel.pipeline.stages import is_replica
from parallel.torch_internals import foreach_norms, foreach_scale_

MOMENTS = ("exp_avg", "exp_avg_sq")
Groups = list[dict[str, Any]]  # each with "params" and "role"
MakeOptimizer = Callable[[Groups], torch.optim.AdamW]  # AdamW over them, with rates and decay by role


@dataclass(frozen=True)
class LocalBox:
    """A box of a stored tensor that is on this rank. Each element is on one rank of a replica."""

    kind: str  # weight | exp_avg | exp_avg_sq | grad
    name: str  # the stored name, as in model.named_parameters()
    shape: tuple[int, ...]  # of the full stored tensor, with all experts of a layer
    box: Box
    values: Tensor  # float32, shaped as the box, a view that may be written in place

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"


class Store(Protocol):
    """Stores weights, moments and gradients, and updates them. Gradients are complete after a step's micro-batches."""

    optimizer: torch.optim.AdamW  # rates are set in its groups
    transient: bool  # whether a box of `local_boxes` is in memory only until the next one is requested
    has_replicas: bool  # whether ranks that differ in dp alone have the same weights and moments
    counts_here: bool  # whether sums over all ranks include this rank's boxes; only one replica's are

    def local_boxes(self, write: bool = False) -> Iterator[LocalBox]:
        """Weights and moments. With ``write`` also their copies; call `refresh` after writing."""

    def gradients(self) -> Iterator[LocalBox]:
        """The gradients that exist."""

    def steps(self, write: bool = False) -> Iterator[tuple[str, Tensor]]:
        """(stored name, AdamW's step count) of each tensor on this rank."""

    def gradient_squares(self) -> Tensor:
        """This rank's share of ‖gradients‖₂², float64: of all, then of each part of the model (`part_number`).

        Each element counts on one rank.
        """

    def measured_bytes(self) -> StateBytes:
        """Measured bytes; call it between backward and update."""

    def scale_gradients(self, factor: float) -> None:
        """Multiply every gradient, in place."""

    def step(self) -> None:
        """Update and drop the gradients."""

    def drop_gradients(self) -> None:
        """Drop the gradients without an update."""

    def refresh(self) -> None:
        """After writing: update everything that depends on weights and moments. A collective."""

    def derived(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of what `refresh` writes and nothing else changes between two updates: copies of weights."""

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of those among `derived` that are equal on all ranks."""


class ShardedAdamW:
    """FSDP2's shards under torch's AdamW, with a group for each role and moments that exist from the start.

    So a part that joins late (MTP) is in every checkpoint and every hash.
    """

    transient, has_replicas = False, True

    def __init__(self, models: Sequence[LongCat], topology: Topology, make_optimizer: MakeOptimizer) -> None:
        self.counts_here = topology.holds_first_replica
        self.num_layers = models[0].config.num_layers
        self._members: tuple[list[int], Tensor] | None = (
            None  # of `_sum_by_part`, as long as the gradients are the same
        )
        # Listed once: while a module is gathered, FSDP2 has unsharded parameters under the same names
        self.parameters = [pair for model in models for pair in model.named_parameters()]
        # MTP's second embedding, on the last pipeline stage; `copies` if the first one is on another rank
        seconds = {id(p) for model in models for name, p in model.named_parameters() if is_replica(model.part, name)}
        self.unique = [pair for pair in self.parameters if id(pair[1]) not in seconds]
        names = {name for name, _ in self.unique}
        self.copies = [pair for pair in self.parameters if id(pair[1]) in seconds and pair[0] not in names]
        by_role: dict[str, list[nn.Parameter]] = defaultdict(list)
        for name, parameter in self.parameters:
            by_role[role(name).value].append(parameter)
        self.optimizer = make_optimizer([{"params": members, "role": kind} for kind, members in by_role.items()])
        for _, parameter in self.parameters:
            self.optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                **{kind: torch.zeros_like(parameter, requires_grad=False) for kind in MOMENTS},
            }

    def local_boxes(self, write: bool = False) -> Iterator[LocalBox]:
        for name, parameter in self.unique + (self.copies if write else []):
            yield local_box("weight", name, parameter)
            for kind in MOMENTS:
                yield local_box(kind, name, self.optimizer.state[parameter][kind])

    def gradients(self) -> Iterator[LocalBox]:
        yield from (local_box("grad", name, p.grad) for name, p in self.unique if p.grad is not None)

    def steps(self, write: bool = False) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.unique + (self.copies if write else []):
            yield name, self.optimizer.state[parameter]["step"]

    def gradient_squares(self) -> Tensor:
        """Summed tensor by tensor in a fixed order; replicas count once."""
        num_parts = self.num_layers + len(OTHER_PARTS)
        grads = list(self.gradients())
        if not grads or not self.counts_here:
            return torch.zeros(1 + num_parts, dtype=torch.float64)
        of_tensors = torch.stack(foreach_norms([grad.values for grad in grads])).double().square()
        parts = [part_number(grad.name, self.num_layers) for grad in grads]
        if of_tensors.device.type != "cpu":
            return torch.cat((of_tensors.sum()[None], self._sum_by_part(of_tensors, parts, num_parts)))
        squares = torch.zeros(1 + num_parts, dtype=torch.float64)
        squares[0] = of_tensors.sum()
        return squares.index_add_(0, 1 + torch.tensor(parts), of_tensors)

    def _sum_by_part(self, of_tensors: Tensor, parts: list[int], num_parts: int) -> Tensor:
        """Sums of the values of each part, in a fixed order, without a copy to the host or atomic additions."""
        if self._members is None or self._members[0] != parts:
            rows = members_by_part(parts, num_parts)
            self._members = parts, to_device(rows, of_tensors.device)
        return torch.cat((of_tensors, of_tensors.new_zeros(1)))[self._members[1]].sum(1)

    def measured_bytes(self) -> StateBytes:
        weights = [local_part(parameter)[0] for _, parameter in self.parameters]
        grads = [local_part(parameter.grad)[0] for _, parameter in self.parameters if parameter.grad is not None]
        moments = [local_part(self.optimizer.state[p][kind])[0] for _, p in self.parameters for kind in MOMENTS]
        return StateBytes(*(float(sum(tensor.nbytes for tensor in kind)) for kind in (weights, grads, moments)))

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        grads = [local_part(p.grad)[0] for _, p in self.parameters if p.grad is not None]
        foreach_scale_(grads, factor)

    def step(self) -> None:
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy a pipeline's first embedding into the second where both are on this rank."""
        first = dict(self.unique)
        for name, parameter in self.parameters:
            if name in first and parameter is not first[name]:
                for mine, theirs in zip(self._state(parameter), self._state(first[name]), strict=True):
                    local_part(mine)[0].copy_(local_part(theirs)[0])

    def derived(self) -> Iterator[tuple[str, Tensor]]:
        unique = {id(parameter) for _, parameter in self.unique}
        for name, parameter in self.parameters:
            if id(parameter) not in unique:
                for kind, tensor in zip(("weight", *MOMENTS, "step"), self._state(parameter), strict=True):
                    yield f"{kind}/second copy of {name}", local_part(tensor)[0]

    def replicas(self) -> Iterator[tuple[str, Tensor]]:
        yield from ()

    def _state(self, parameter: nn.Parameter) -> list[Tensor]:
        state = self.optimizer.state[parameter]
        return [parameter.detach(), *(state[kind] for kind in MOMENTS), state["step"]]


def members_by_part(parts: list[int], num_parts: int) -> Tensor:
    """The part of each of n values → the values' numbers in rows, one a part [P, most], filled up with n."""
    members: list[list[int]] = [[] for _ in range(num_parts)]
    for number, part in enumerate(parts):
        members[part].append(number)
    most = max(map(len, members))
    return torch.tensor([row + [len(parts)] * (most - len(row)) for row in members])


def local_box(kind: str, name: str, tensor: Tensor) -> LocalBox:
    """This rank's box of a tensor that may be sharded."""
    values, box = local_part(tensor)
    shape = tuple(tensor.shape)
    return LocalBox(kind, name, shape, box or tuple((0, size) for size in shape), values)
