"""How many rows ranks send each other for their experts: the host needs the numbers before the rows."""

# C chunks, N FFN experts, n ranks of the group, E = N/n experts here

from __future__ import annotations

from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from longcat.dispatch import Routing
from longcat.ops.permute import Permutation, plan_permutation
from longcat.ops.selections import count_selections
from parallel.collectives.streams import StreamContext
from parallel.sdc.ledger import LEDGER, group_ranks
from parallel.watchdog.events import Event, SpanKind
from parallel.watchdog.spans import launching, wait_span

MARK_BITS = 40  # more than any number of rows needs


class SplitSizes:
    """The numbers of rows that ranks send each other in all chunks of a layer; their all-to-all is under way.

    Behind the counts of a chunk travels a check word, the complement of their sum and of a mark of sender and chunk: a
    wrong number of rows would end in a wrong exchange, or in memory that does not exist, before the step's checks of
    messages have their turn.
    """

    def __init__(self, routings: list[Routing], group: dist.ProcessGroup, streams: StreamContext, layer: int) -> None:
        self.group, self.streams, self.event = group, streams, Event(SpanKind.EXPERT_COUNTS, layer)
        with streams.on_side_stream():
            counts = torch.stack([count_selections(one.indices, one.num_routed)[: one.num_experts] for one in routings])
            by_rank = counts.view(len(routings), dist.get_world_size(group), -1).transpose(0, 1)  # [n, C, E]
            self.rows = by_rank.sum(2)  # [n, C] to each rank
            self.counts = counts  # [C, N]
            marks = self._marks(group.size())
            self.outgoing = torch.cat((by_rank, ~(self.rows + marks[group.rank()])[:, :, None]), 2)  # [n, C, E + 1]
            self.arrived = torch.empty_like(self.outgoing)
            self.incoming = self.arrived[:, :, :-1]  # [n, C, E] from each rank, for each expert here
            with launching(self.event, group):
                self.work = dist.all_to_all_single(self.arrived, self.outgoing, group=group, async_op=True)
            self.number = LEDGER.send_parts(self.event.text, group, self.outgoing)
            if streams.is_async_host:
                self.work.wait()
                LEDGER.receive_parts(self.event.text, group, self.number, self.arrived)
                numbers = self.rows, self.incoming.sum(2), ~self.arrived[:, :, -1] - marks
                self._numbers = streams.to_host(torch.stack(numbers))

    @cached_property
    def _arrived(self) -> list[list[list[int]]]:
        with wait_span(self.event, self.group):
            return self._numbers()

    @cached_property
    def sent(self) -> list[list[int]]:
        """[n, C] rows for each rank in each chunk. Known before `received`, unless the host is asynchronous."""
        return self._arrived[0] if self.streams.is_async_host else self.rows.tolist()

    @cached_property
    def received(self) -> list[list[int]]:
        """[n, C] rows from each rank in each chunk.

        Raises:
            LocalCorruptionError: the counts of a rank contradict their check word.
        """
        if self.streams.is_async_host:
            _, rows, expected = self._arrived
        else:
            with wait_span(self.event, self.group):
                self.work.wait()
            LEDGER.receive_parts(self.event.text, self.group, self.number, self.arrived)
            rows = self.incoming.sum(2).tolist()
            expected = (~self.arrived[:, :, -1] - self._marks(self.group.size())).tolist()
        for rank, (found, told) in enumerate(zip(rows, expected, strict=True)):
            if found != told:
                raise LEDGER.corrupt(self.event.text, group_ranks(self.group)[rank])
        return rows

    def _marks(self, num_ranks: int) -> Tensor:
        """[n, C] a number of each sender's chunk, above any number of rows."""
        num_chunks = self.rows.shape[1]
        numbers = torch.arange(1, num_ranks * num_chunks + 1, device=self.rows.device)
        return (numbers << MARK_BITS).view(num_ranks, num_chunks)

    def plan(self, number: int, routing: Routing) -> Permutation:
        """The plan that sorts the rows of chunk ``number``; where no wait is needed, compared with the counts sent.

        Raises:
            LocalCorruptionError: they differ; this rank would send other rows than it said.
        """
        if self.streams.is_async_host:
            num_rows = sum(row[number] for row in self.sent)
            return plan_permutation(routing.indices, routing.num_experts, routing.num_routed, num_rows)
        plan = plan_permutation(routing.indices, routing.num_experts, routing.num_routed)
        if not torch.equal(self.counts[number], plan.counts[: routing.num_experts]):
            detail = "were counted otherwise than when their rows were sorted"
            raise LEDGER.corrupt(self.event.text, LEDGER.rank, detail)
        return plan
