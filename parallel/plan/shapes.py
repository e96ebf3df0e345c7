"""Shape-only versions of what reads values: operators whose sizes depend on the routing, and split sizes.

Each allocates what the one that it stands for allocates on a CPU, in that order, so that a trace has the same peak.
The number of rows is an assumption: FFN selections per token, and how many times its fair share a rank receives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import longcat.dispatch
import parallel.collectives.collective
import parallel.collectives.point_to_point
import parallel.expert.dispatchers
import parallel.fsdp.collectives
from longcat.dispatch import LocalDispatcher, LocalPending, Routing
from longcat.ops import embedding, grouped, permute, rows
from longcat.ops.torch_library import PLAIN
from parallel.collectives.point_to_point import Messages
from parallel.expert.dispatchers import SplitSizes


@dataclass(frozen=True)
class RoutingAssumption:
    """What a trace assumes of routers."""

    ffn_experts: float  # FFN selections of a token, on average
    imbalance: float = 1.0  # rows that this rank's experts receive, over their fair share

    def rows(self, tokens: int) -> int:
        return round(tokens * self.ffn_experts)


def sum_rows(values: Tensor, row_index: Tensor, weights: Tensor | None) -> Tensor:
    """`longcat.ops.rows._sum_rows`: every row is chosen once."""
    num_rows, (tokens, _) = values.shape[0], row_index.shape
    chosen = row_index.reshape(-1) >= 0
    row = row_index.new_empty(num_rows)
    ends = chosen.view(row_index.shape).sum(1).cumsum(0)
    weight = None if weights is None else values.new_empty(num_rows)
    if values.element_size() == 2:
        kept = (values.new_empty(num_rows) if weight is None else weight, ends.new_empty(tokens + 1))
    elif weight is not None:
        weighted = values * values.new_zeros(num_rows)[:, None]
        kept = (weighted, ends.new_empty(tokens))
    else:
        kept = (values, ends.new_empty(tokens))
    out = values.new_empty(tokens, values.shape[1])
    del row, kept
    return out


def embedding_gradient(grad: Tensor, ids: Tensor, num_rows: int) -> Tensor:
    """`longcat.ops.embedding.embedding_gradient` for as many different ids as a uniform draw of them has."""
    out = grad.new_zeros(num_rows, grad.shape[1])
    kept = torch.sort(ids, stable=True)
    different = round(num_rows * (1 - (1 - 1 / num_rows) ** ids.shape[0]))
    sums = grad.to(torch.float32).new_empty(different, grad.shape[1])
    cast = sums.to(grad.dtype)
    del kept, cast
    return out


def grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """`longcat.ops.grouped.grouped_product`."""
    out = grouped.upcast(a, b)[0].new_empty(a.shape[0], b.shape[2])
    return out.to(a.dtype)


def grouped_sum(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """`longcat.ops.grouped.grouped_sum`."""
    out = grouped.upcast(a, b)[0].new_empty(ends.shape[0], a.shape[1], b.shape[1])
    return out.to(a.dtype)


def all_gather(out: Tensor, x: Tensor, group: Any) -> Messages:
    """`parallel.collectives.point_to_point.all_gather`, which compares addresses, and fake tensors have none."""
    own = out[group.rank()]
    if own.untyped_storage()._cdata != x.untyped_storage()._cdata:
        own.copy_(x)
    return Messages("all-gather", group, [own] * group.size(), list(out))


def no_capacity(counts: Tensor, like: Tensor) -> None:
    """`longcat.ops.grouped.padded_capacity` where nothing is padded."""


@contextmanager
def shapes_only(assumed: RoutingAssumption) -> Iterator[None]:
    """Put the shape-only versions in place, and the plain version in place of every other operator of our own."""
    plain_plan: Callable[..., Any] = PLAIN[permute._plan]

    def plan(indices: Tensor, num_experts: int, num_routed: int, num_rows: int | None = None) -> Any:
        number = assumed.rows(indices.shape[0]) if num_rows is None else num_rows
        return plain_plan(indices, num_experts, num_routed, number)

    def start_dispatch(self: LocalDispatcher, chunks: list[tuple[Tensor, Routing]]) -> list[LocalPending]:
        return [LocalPending(x, routing, partial(assumed.rows, x.shape[0])) for x, routing in chunks]

    def shares(factor: float) -> property:
        def of_ranks(self: SplitSizes) -> list[list[int]]:
            ranks = self.rows.shape[0]
            tokens: list[int] = self.tokens  # type: ignore[attr-defined]
            return [[int(assumed.rows(of_chunk) * factor / ranks) for of_chunk in tokens] for _ in range(ranks)]

        return property(of_ranks)

    init = SplitSizes.__init__

    def with_tokens(self: SplitSizes, routings: list[Routing], *rest: Any) -> None:
        init(self, routings, *rest)
        self.tokens = [routing.indices.shape[0] for routing in routings]  # type: ignore[attr-defined]

    instead = {permute._plan: plan, embedding.embedding_gradient: embedding_gradient}
    dispatchers = parallel.expert.dispatchers
    gathering = (parallel.collectives.point_to_point, parallel.collectives.collective, parallel.fsdp.collectives)
    with ExitStack() as stack:

        def put(where: Any, name: str, what: Any) -> None:
            stack.enter_context(patch.object(where, name, what))

        put(rows, "_sum_rows", sum_rows)
        for module in (rows, permute, embedding, dispatchers):
            for name, value in list(vars(module).items()):
                if isinstance(value, torch._ops.OpOverload) and value in PLAIN:
                    put(module, name, instead.get(value, PLAIN[value]))
        put(LocalDispatcher, "start_dispatch", start_dispatch)
        put(SplitSizes, "__init__", with_tokens)
        put(SplitSizes, "sent", shares(1.0))
        put(SplitSizes, "received", shares(assumed.imbalance))
        put(longcat.dispatch, "padded_capacity", no_capacity)
        put(dispatchers, "padded_capacity", no_capacity)
        put(grouped, "grouped_product", grouped_product)
        put(grouped, "grouped_sum", grouped_sum)
        for module in (*gathering, dispatchers):
            if hasattr(module, "all_gather"):
                put(module, "all_gather", all_gather)
        yield
