"""Equal bits at every data-parallel size: N virtual ranks, whose gradients are added in one fixed order.

The global batch belongs to N virtual data ranks. D of them run at once, and each data rank takes N/D virtual ranks in
turn. Numbering them so that those of one turn are neighbours makes every sum a part of one tree, whatever D is:

    inside a virtual rank      its micro-batches, in order
    inside an expert group     the virtual ranks that share it, and the ranks of cp and tp, in rank order
    between expert groups      a binary tree: over fsdp, then over dp, then over turns

So a smaller run does in turn what N ranks do at once: as many collectives for a token, and sums of whole turns are kept
as shards. What else depends on the size: the gradient norm (`exact_squares`) and the tails of AdamW (`update_tails`).
"""

# N virtual data ranks, D data ranks

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from longcat.model import LongCat, Losses
from longcat.names import OTHER_PARTS, part_number
from parallel.engine import MicroBatch, Objective
from parallel.fsdp.sharding import local_part
from parallel.layout import BatchShape
from parallel.mesh import MeshSizes, Topology
from parallel.reduce import max_over_ranks, sum_over_ranks
from parallel.state_store import MOMENTS, MakeOptimizer, ShardedAdamW
from parallel.torch_internals import foreach_add_
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import wait_span

VECTOR = 16  # float32 numbers in the longest vector register (AVX-512)
ROW = 1024  # squares whose 52-bit integers add up without overflow
CHUNK = 65_536  # elements squared at once: the float64 values stay in a CPU's cache


@dataclass(frozen=True)
class VirtualRanks:
    """How N virtual data ranks run on D data ranks, of which ``group`` share the tokens of an expert-parallel group."""

    number: int  # N
    data_ranks: int  # D
    group: int

    @property
    def turns(self) -> int:
        """Virtual ranks that each data rank runs, one after the other."""
        return self.number // self.data_ranks

    def branches(self, replicas: int) -> int:
        """Expert groups of a replica, whose gradients its reduce-scatter adds as a tree."""
        return self.data_ranks // replicas // self.group

    def micro_batches(self, data_rank: int, total: int) -> list[int]:
        """The numbers of a data rank's micro-batches out of ``total``, in order, one turn after the other.

        Data rank k of an expert group reads each k-th micro-batch of the group's. So the micro-batches that experts see
        in one matrix product are the same at every D.
        """
        share = total // self.number  # of a virtual rank
        group, k = divmod(data_rank, self.group)
        num_groups = self.data_ranks // self.group
        return [
            ((turn * num_groups + group) * share + step) * self.group + k
            for turn in range(self.turns)
            for step in range(share)
        ]


def virtual_ranks(elastic_bits: int, sizes: MeshSizes) -> VirtualRanks | None:
    """The virtual ranks of `train.elastic_bits`; None if it is 0."""
    if not elastic_bits:
        return None
    return VirtualRanks(elastic_bits, sizes.data_ranks, max(1, sizes.ep // (sizes.cp * sizes.tp)))


class TurnEngine(Protocol):
    """An engine whose reduced gradients can be taken before the last micro-batch."""

    parts: list[LongCat]

    def run_turn(self, micro_batches: Sequence[MicroBatch], objective: Objective, mtp: bool) -> list[list[Losses]]:
        """Forward and backward; gradients are summed over ranks."""

    def complete(self) -> None:
        """Sum the gradients of weights that two parts share, after the last turn."""

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[list[Losses]]: ...

    def reshape(self, batch: BatchShape) -> None: ...

    def close(self) -> None: ...


class ElasticEngine:
    """Runs a rank's virtual ranks in turn and adds their gradients as a binary tree."""

    def __init__(self, engine: TurnEngine, turns: int) -> None:
        self.engine, self.turns = engine, turns
        self.parts = engine.parts
        # Listed before the first step: FSDP2 later swaps gathered parameters in and out under the same names
        self.parameters = [parameter for model in self.parts for parameter in model.parameters()]

    def run(self, micro_batches: Sequence[MicroBatch], objective: Objective, mtp: bool) -> list[list[Losses]]:
        share = len(micro_batches) // self.turns
        tree = GradientTree(self.parameters)
        losses: list[list[Losses]] = [[] for _ in self.parts]
        for turn in range(self.turns):
            found = self.engine.run_turn(micro_batches[turn * share : (turn + 1) * share], objective, mtp)
            for of_part, new in zip(losses, found, strict=True):
                of_part.extend(new)
            tree.add_turn()
        tree.finish()
        self.engine.complete()
        return losses

    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> list[list[Losses]]:
        return self.engine.evaluate(micro_batches)

    def reshape(self, batch: BatchShape) -> None:
        self.engine.reshape(batch)

    def close(self) -> None:
        self.engine.close()


class GradientTree:
    """Adds the gradients of 2^k turns as a binary tree, with at most k sums waiting: a binary counter."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters
        self.waiting: list[tuple[int, list[Tensor | None]]] = []  # (level, sums of 2^level turns)

    @torch.no_grad()
    def add_turn(self) -> None:
        """Take the parameters' gradients; those of a turn are all there, or None in every turn of the step."""
        level, sums = 0, [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        while self.waiting and self.waiting[-1][0] == level:
            _, earlier = self.waiting.pop()
            pairs = [(a, b) for a, b in zip(earlier, sums, strict=True) if a is not None and b is not None]
            if pairs:
                foreach_add_([local_part(a)[0] for a, _ in pairs], [local_part(b)[0] for _, b in pairs])
            level, sums = level + 1, earlier
        self.waiting.append((level, sums))

    def finish(self) -> None:
        """Give the parameters the sums of all turns."""
        ((_, sums),) = self.waiting
        for parameter, grad in zip(self.parameters, sums, strict=True):
            parameter.grad = grad


class ElasticAdamW(ShardedAdamW):
    """AdamW whose norm and updates do not depend on how a tensor is cut into shards."""

    def __init__(self, models: Sequence[LongCat], topology: Topology, make_optimizer: MakeOptimizer) -> None:
        super().__init__(models, topology, make_optimizer)
        self.is_first = topology.is_first

    def gradient_squares(self) -> Tensor:
        """The exact sums of all ranks, as the first rank's share. A collective."""
        grads: dict[int, list[Tensor]] = {}
        for grad in self.gradients() if self.counts_here else ():
            if grad.values.numel():
                grads.setdefault(part_number(grad.name, self.num_layers), []).append(grad.values)
        parts = exact_squares(grads, self.num_layers + len(OTHER_PARTS))
        squares = torch.tensor([math.fsum(parts), *parts], dtype=torch.float64)
        return squares if self.is_first else torch.zeros_like(squares)

    def step(self) -> None:
        update_tails(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)


def exact_squares(tensors: dict[int, list[Tensor]], num_parts: int) -> list[float]:
    """Σ x² of float32 tensors by part of the model, over all ranks, independent of their order. A collective.

    Each square is rounded to a multiple of 2^-52 of a power of two above the part's largest square; these multiples are
    added as integers. A part with a value that is not finite has an infinite sum.
    """
    largest = torch.zeros(num_parts, dtype=torch.float64)
    for part, members in tensors.items():
        ends = [torch.stack(torch.aminmax(one)) for one in members]  # a twentieth of the infinity norm's time on a CPU
        top = torch.stack(ends).abs().max().double().cpu()
        largest[part] = top if math.isfinite(top) else math.inf
    max_over_ranks(largest)
    exponents = [2 * math.frexp(top)[1] if 0 < top < math.inf else None for top in largest.tolist()]
    limbs = torch.zeros(num_parts, 2, dtype=torch.int64)
    for part, members in tensors.items():
        exponent = exponents[part]
        if exponent is not None:
            limbs[part] = sum((_integer_squares(one, exponent) for one in members), torch.zeros(2, dtype=torch.int64))
    sum_over_ranks(limbs)
    sums = []
    for top, exponent, (high, low) in zip(largest.tolist(), exponents, limbs.tolist(), strict=True):
        sums.append(top if exponent is None else math.ldexp(float((high << 31) + low), exponent - 52))
    return sums


def _integer_squares(values: Tensor, exponent: int) -> Tensor:
    """Σ round(x² / 2^(exponent - 52)) of values below 2^(exponent / 2) → [2] int64: Σ = 2^31 · [0] + [1].

    A float32 squared is exact in float64. 2^exponent + x² has the bits of 2^exponent as a float64, plus the integer.
    """
    flat = values.reshape(-1)
    base = torch.tensor(2.0**exponent, dtype=torch.float64, device=values.device)
    whole = len(flat) - len(flat) % ROW
    chunks = flat[:whole].split(CHUNK if values.device.type == "cpu" else 1 << 24)
    bits = int(base.view(torch.int64))
    buffer = torch.empty(max(len(chunks[0]), ROW), dtype=torch.float64, device=values.device)

    def integers(part: Tensor) -> Tensor:
        exact = buffer[: len(part)].copy_(part)
        return torch.addcmul(base, exact, exact, out=exact).view(torch.int64)

    rows = [integers(chunk).view(-1, ROW).sum(1) - _wrapped(bits * ROW) for chunk in chunks if len(chunk)]
    rest = integers(flat[whole:]).sum() - _wrapped(bits * (len(flat) - whole))
    sums = torch.cat((*rows, rest[None]))  # each below 2^62
    return torch.stack(((sums >> 31).sum(), (sums & MASK).sum())).cpu()


MASK = (1 << 31) - 1


def _wrapped(number: int) -> int:
    """A number modulo 2^64, as int64 arithmetic leaves it."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)


@torch.no_grad()
def update_tails(optimizer: torch.optim.AdamW) -> None:
    """One step of AdamW with the bits of whole vectors for every element.

    The fused kernel computes the last elements of a tensor, those that do not fill a vector, by other instructions, and
    which elements these are depends on the shards. They are computed a second time, padded to a vector.
    """
    updates: list[tuple[list[Tensor], Callable[[], list[Tensor]]]] = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = optimizer.state[parameter]
            tensors = [local_part(t)[0] for t in (parameter, parameter.grad, *(state[m] for m in MOMENTS))]
            rest = tensors[0].numel() % VECTOR
            if rest:
                tails = [tensor.view(-1)[-rest:] for tensor in tensors]
                padded = [nn.functional.pad(tail, (0, VECTOR - rest)) for tail in tails]
                updates.append((tails, partial(_updated, padded, state["step"].clone(), group)))
    optimizer.step()
    for (weight, _, *moments), update in updates:
        for tail, new in zip((weight, *moments), update(), strict=True):
            tail.copy_(new[: len(tail)])


def _updated(padded: list[Tensor], step: Tensor, group: dict[str, Any]) -> list[Tensor]:
    """Weight and moments after AdamW's step, in place of [weight, gradient, moments]."""
    weight, grad, mean, square = padded
    beta1, beta2 = group["betas"]
    adamw(
        *([weight], [grad], [mean], [square], [], [step]),
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
    return [weight, mean, square]


def sum_exactly(rows: Tensor) -> Tensor:
    """Float64 ``rows`` [n, k] of every rank → their correctly rounded column sums [k], the same in any order.

    The first rank returns the sums and the others zeros, so that a further sum over ranks keeps them. A collective.
    """
    gathered = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    if len(gathered) > 1:
        with wait_span(Event(SpanKind.SUM)):
            dist.all_gather(gathered, rows)
    else:
        gathered = [rows]
    if dist.get_rank():
        return torch.zeros(rows.shape[1], dtype=torch.float64)
    columns = torch.cat(gathered).T.tolist()
    return torch.tensor([_fsum(column) for column in columns], dtype=torch.float64)


def _fsum(values: list[float]) -> float:
    """`math.fsum`, which raises where the values have no finite sum."""
    return math.fsum(values) if all(map(math.isfinite, values)) else sum(values)
