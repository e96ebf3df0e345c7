"""Positions of a sequence sharded over context- and tensor-parallel ranks: the model's `SequenceSharding`.

Context parallelism cuts a sequence into 2·cp chunks and gives rank r the chunks r and 2·cp - 1 - r: with a causal
mask all ranks then have the same work. For attention, ranks gather the normed latents of keys and values and the shared
rotary key: R + rotary numbers per position. Exchanging heads would also move the latents of queries and the heads'
results; passing keys and values around a ring would move H·(C + V). Each rank expands the heads of all
positions from the latents.

Tensor parallelism cuts the positions of a context rank into tp chunks between the parts that are split by heads
or columns (sequence parallelism): norms, latents, router and residual work on s = S/(cp·tp) positions.
"""

# B sequences, S all positions, q = S/cp, s = q/tp, D width, R latent width

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longcat.interfaces import install
from longcat.model import LongCat
from parallel.collectives.async_collective import AsyncCollective, run_blocking, start, wait
from parallel.collectives.collective import AllGather, ReduceScatter
from parallel.collectives.streams import CURRENT_STREAM, StreamContext
from parallel.mesh import Axis, Topology
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import launching, wait_span


def apply_sequence_parallel(model: LongCat, topology: Topology) -> None:
    """Let a model work on this rank's share of each sequence, in place."""
    if topology.sizes.cp * topology.sizes.tp == 1:
        return
    install(model, sequence=lambda name: ShardedSequence(topology, name or "model"))


class ShardedSequence:
    """This rank's positions. ``module`` is its path, for messages."""

    def __init__(self, topology: Topology, module: str) -> None:
        self.module = module
        self.cp, self.tp = topology.sizes.cp, topology.sizes.tp
        self.cp_rank = topology.coordinate(Axis.CP)
        self.tp_rank = topology.coordinate(Axis.TP)
        self.tp_group = topology.group(Axis.TP)
        self.shared_group = topology.shared.get_group()  # cp × tp, tp innermost
        self.exchange_group = topology.context_exchange
        self.streams: StreamContext = CURRENT_STREAM
        self.num_shards = self.cp * self.tp

    def ranges(self, length: int) -> list[tuple[int, int]]:
        return cp_ranges(length, self.cp, self.cp_rank)

    def positions(self, length: int) -> Tensor:
        queries = torch.cat([torch.arange(start, stop) for start, stop in self.ranges(length)])
        return queries.tensor_split(self.tp)[self.tp_rank]

    def select(self, values: Tensor) -> Tensor:
        if self.cp == 1:
            return values
        return torch.cat([values[:, start:stop] for start, stop in self.ranges(values.shape[1])], 1)

    def gather(self, x: Tensor) -> Tensor:
        if self.tp == 1:
            return x
        gathered = run_blocking(x, AllGather(self._event(SpanKind.SEQUENCE_ALL_GATHER), self.tp_group))
        return gathered.transpose(0, 1).flatten(1, 2)  # [tp, B, s, D] → [B, q, D]

    def reduce(self, partial: Tensor) -> Tensor:
        if self.tp == 1:
            return partial
        chunks = partial.unflatten(1, (self.tp, -1)).transpose(0, 1)  # [tp, B, s, D]
        return run_blocking(chunks, ReduceScatter(self._event(SpanKind.SEQUENCE_REDUCE_SCATTER), self.tp_group))

    def start_keys(self, latents: Tensor) -> AsyncCollective:
        return start(latents, AllGather(self._event(SpanKind.ATTENTION_LATENTS), self.exchange_group), self.streams)

    def wait_keys(self, handle: AsyncCollective) -> Tensor:
        gathered = wait(handle)  # [cp·tp, B, s, R]
        by_context = gathered.unflatten(0, (self.cp, self.tp)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # [cp, B, q, R]
        if self.cp == 1:
            return by_context[0]
        early, late = by_context.chunk(2, 2)  # rank r: chunks r and 2·cp - 1 - r
        chunks = torch.cat((early, late.flip(0)))  # [2·cp, B, S/(2·cp), R]
        return chunks.transpose(0, 1).flatten(1, 2)

    def start_count(self, counts: Tensor) -> Any:
        total = counts.clone()
        with launching(self._event(SpanKind.BALANCE_COUNTS), self.shared_group):
            handle = dist.all_reduce(total, group=self.shared_group, async_op=True), total
        return (None, self.wait_count(handle)) if self.streams.blocking else handle

    def wait_count(self, handle: Any) -> Tensor:
        work, total = handle
        if work is None:
            return total  # type: ignore[no-any-return]
        with wait_span(self._event(SpanKind.BALANCE_COUNTS), self.shared_group):
            work.wait()
        return total  # type: ignore[no-any-return]

    def _event(self, kind: SpanKind) -> Event:
        return Event(kind, module=self.module)


def cp_ranges(length: int, cp: int, rank: int) -> list[tuple[int, int]]:
    """(start, stop) of the two chunks of a context-parallel rank."""
    if cp == 1:
        return [(0, length)]
    width = length // (2 * cp)
    return [(index * width, (index + 1) * width) for index in (rank, 2 * cp - 1 - rank)]
