"""Shape-only versions of what reads values: operators whose sizes depend on the routing, and split sizes.

Each allocates what the one that it stands for allocates, in that order, so that a trace has the same peak. On a CPU
that is exact. For a GPU there are also versions of attention and of collectives: its fused attention saves its result
and a number for each row, and a collective of NCCL needs no tensors beside its own.
The number of rows is an assumption: FFN selections per token, and how many times its fair share a rank receives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

import longcat.attention
import longcat.dispatch
import longcat.model
import longcat.moe
import longcat.ops.cross_entropy
import longcat.ops.fp32_linear
import longcat.ops.matmul
import parallel.collectives.collective
import parallel.collectives.point_to_point
import parallel.expert.dispatchers
import parallel.fsdp.collectives
from longcat.dispatch import LocalDispatcher, LocalPending, Routing
from longcat.ops import elementwise, embedding, fusion, grouped, permute, rotation, rows, selections
from longcat.ops.recomputed import recomputable
from longcat.ops.torch_internals import storage_key
from longcat.ops.torch_library import PLAIN
from longcat.recompute_values import Value
from parallel.collectives.point_to_point import Messages
from parallel.expert import split_sizes
from parallel.expert.split_sizes import SplitSizes
from parallel.kernels.shapes import SHAPES
from parallel.plan.recorder import AllocationRecorder


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


def grouped_versions(recorder: AllocationRecorder) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """`longcat.ops.grouped.grouped_product` and `grouped_sum`."""

    def count(a: Tensor, b: Tensor, out: Tensor, columns: int) -> Tensor:
        flops = 2.0 * a.shape[0] * a.shape[1] * columns
        recorder.count(flops, sum(one.numel() * one.element_size() for one in (a, b, out)), a.dtype)
        return out.to(a.dtype)

    def grouped_product(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        out = grouped.upcast(a, b)[0].new_empty(a.shape[0], b.shape[2])
        return count(a, b, out, b.shape[2])

    def grouped_sum(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        out = grouped.upcast(a, b)[0].new_empty(ends.shape[0], a.shape[1], b.shape[1])
        return count(a, b, out, b.shape[1])

    return grouped_product, grouped_sum


class Done(dist.Work):
    """A collective that has ended; keeps its input until it is waited for, as one that runs does."""

    def __init__(self, *kept: Tensor) -> None:
        super().__init__()
        self.kept: tuple[Tensor, ...] = kept

    def wait(self, timeout: Any = None) -> bool:
        self.kept = ()
        return True


def all_gather_on_gpu(out: Tensor, x: Tensor, group: Any) -> dist.Work:
    """`parallel.collectives.point_to_point.all_gather` by one call of NCCL."""
    return Done(x)


def reduce_scatter_on_gpu(out: Tensor, x: Tensor, group: Any, label: str = "", branches: int = 1) -> dist.Work:
    """`parallel.collectives.point_to_point.reduce_scatter` by one call of NCCL."""
    return Done(x)


def flash_attention(recorder: AllocationRecorder) -> Callable[..., Tensor]:
    """`longcat.ops.attention.causal_attention` by flash attention: two products forward, five backward."""

    class Flash(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, value_width: int, pairs: float) -> Tensor:
            width, ctx.pairs, ctx.value_width = max(key.shape[3], value.shape[3]), pairs, value.shape[3]

            def widen(value: Tensor) -> Tensor:
                return value if value.shape[3] == width else value.new_empty(*value.shape[:3], width)

            def attend(query: Tensor, key: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
                result = wide.new_empty(*query.shape[:3], width)
                rows = query.new_empty(query.shape[:3], dtype=torch.float32)
                out = result[..., -value_width:].contiguous()
                recorder.count(4 * pairs * width, nbytes(query, key, wide, out), query.dtype)
                return out, rows

            wide = recomputable(Value.expansion, widen, value)
            out, rows = recomputable(Value.attention, attend, query, key, wide)
            ctx.save_for_backward(query, key, wide, out, rows)
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Any:
            query, key, wide, out, _ = ctx.saved_tensors
            recorder.count(10 * ctx.pairs * wide.shape[3], 2 * nbytes(query, key, wide, out), query.dtype)
            padded = out.new_empty(2, *out.shape[:3], wide.shape[3])  # the result and its gradient
            found = torch.empty_like(query), torch.empty_like(key), torch.empty_like(wide)
            del padded
            return found[0], found[1], found[2][..., -ctx.value_width :], None, None

    def causal_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        documents: Any,
        ranges: Any = None,
        value_width: int | None = None,
    ) -> Tensor:
        ranges = [(0, key.shape[1])] if ranges is None else ranges
        each = query.shape[0] * query.shape[2]
        pairs = sum(each * (stop - start) * (start + stop + 1) / 2 for start, stop in ranges)
        return Flash.apply(query, key, value, value.shape[3] if value_width is None else value_width, pairs)

    return causal_attention


def one_kernel(recorder: AllocationRecorder, name: str) -> Callable[..., Any]:
    """The operator ``name`` as its kernel on a GPU: nothing but its results is allocated."""

    def run(*args: Any) -> Any:
        out = SHAPES[name](*args)
        tensors = [one for one in (*args, *(out if isinstance(out, tuple) else (out,))) if isinstance(one, Tensor)]
        recorder.count(0.0, nbytes(*tensors), tensors[0].dtype)
        return out

    return run


def combine_rows_on_gpu(recorder: AllocationRecorder) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`longcat.ops.rows.combine_rows` and its backward, each one Triton kernel."""

    def combine_rows(rows: Tensor, gates: Tensor, row_index: Tensor, x: Tensor | None) -> Tensor:
        out = rows.new_empty(gates.shape[0], rows.shape[1])
        recorder.count(0.0, nbytes(rows, out, *([] if x is None else [x])), rows.dtype)
        return out

    def backward(
        grad: Tensor, gates: Tensor, token: Tensor, selection: Tensor, index: Tensor, x: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad_rows = grad.new_empty(token.shape[0], grad.shape[1])
        grad_x = grad.new_empty(0) if x is None else torch.empty_like(x)
        recorder.count(0.0, nbytes(grad, grad_rows, *([] if x is None else [x, grad_x])), grad.dtype)
        return grad_rows, torch.empty_like(gates), grad_x

    return combine_rows, backward


def nbytes(*tensors: Tensor) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)


def all_gather(out: Tensor, x: Tensor, group: Any) -> Messages:
    """`parallel.collectives.point_to_point.all_gather`, which compares addresses, and fake tensors have none."""
    own = out[group.rank()]
    if storage_key(own.untyped_storage()) != storage_key(x.untyped_storage()):
        own.copy_(x)
    return Messages("all-gather", group, [own] * group.size(), list(out))


def no_capacity(counts: Tensor, like: Tensor) -> None:
    """`longcat.ops.grouped.padded_capacity` where nothing is padded."""


@contextmanager
def shapes_of_routing(assumed: RoutingAssumption) -> Iterator[None]:
    """Put assumed numbers of rows in place of those that routers decide and a host reads; a GPU's copies remain."""

    plain = LocalDispatcher.start_dispatch

    def start_dispatch(self: LocalDispatcher, chunks: list[tuple[Tensor, Routing]]) -> list[LocalPending]:
        if not chunks[0][0].is_cuda:
            return [LocalPending(x, routing, partial(assumed.rows, x.shape[0])) for x, routing in chunks]
        return [replace(one, num_rows=partial(instead_of, one)) for one in plain(self, chunks)]

    def instead_of(pending: LocalPending) -> int:
        pending.num_rows()  # waits for the copy
        return assumed.rows(pending.x.shape[0])

    def shares(factor: float) -> property:
        def of_ranks(self: SplitSizes) -> list[list[int]]:
            if self.streams.is_async_host:
                _ = self._arrived
            ranks = self.rows.shape[0]
            tokens: list[int] = self.tokens  # type: ignore[attr-defined]
            return [[int(assumed.rows(of_chunk) * factor / ranks) for of_chunk in tokens] for _ in range(ranks)]

        return property(of_ranks)

    init = SplitSizes.__init__

    def with_tokens(self: SplitSizes, routings: list[Routing], *rest: Any) -> None:
        init(self, routings, *rest)
        self.tokens = [routing.indices.shape[0] for routing in routings]  # type: ignore[attr-defined]

    def plan_of_shares(self: SplitSizes, number: int, routing: Routing) -> permute.Permutation:
        num_rows = sum(row[number] for row in self.sent)
        return permute.plan_permutation(routing.indices, routing.num_experts, routing.num_routed, num_rows)

    with (
        patch.object(LocalDispatcher, "start_dispatch", start_dispatch),
        patch.object(SplitSizes, "__init__", with_tokens),
        patch.object(SplitSizes, "plan", plan_of_shares),
        patch.object(SplitSizes, "sent", shares(1.0)),
        patch.object(SplitSizes, "received", shares(assumed.imbalance)),
        patch.object(longcat.dispatch, "padded_capacity", no_capacity),
        patch.object(parallel.expert.dispatchers, "padded_capacity", no_capacity),
    ):
        yield


@contextmanager
def shapes_only(assumed: RoutingAssumption, recorder: AllocationRecorder, on_gpu: bool) -> Iterator[None]:
    """Put the shape-only versions in place, and the plain version in place of every other operator of our own."""
    plain_plan: Callable[..., Any] = PLAIN[permute._plan]

    def plan(indices: Tensor, num_experts: int, num_routed: int, num_rows: int | None = None) -> Any:
        number = assumed.rows(indices.shape[0]) if num_rows is None else num_rows
        return plain_plan(indices, num_experts, num_routed, number)

    instead: dict[Any, Any] = {permute._plan: plan, embedding.embedding_gradient: embedding_gradient}
    if on_gpu:
        instead[rows.combine_rows], instead[rows.combine_rows_backward] = combine_rows_on_gpu(recorder)
        instead[rows.dot_rows] = one_kernel(recorder, "dot_rows")
    dispatchers = parallel.expert.dispatchers
    gathering = (parallel.collectives.point_to_point, parallel.collectives.collective, parallel.fsdp.collectives)
    with ExitStack() as stack:

        def put(where: Any, name: str, what: Any) -> None:
            stack.enter_context(patch.object(where, name, what))

        stack.enter_context(shapes_of_routing(assumed))
        put(rows, "_sum_rows", sum_rows)
        for module in (rows, permute, selections, embedding, longcat.moe, dispatchers, split_sizes):
            for name, value in list(vars(module).items()):
                if callable(value) and value in PLAIN:
                    put(module, name, instead.get(value, PLAIN[value]))
        for name, version in zip(("grouped_product", "grouped_sum"), grouped_versions(recorder), strict=True):
            put(grouped, name, version)
        for module in (*gathering, dispatchers):
            if hasattr(module, "all_gather"):
                put(module, "all_gather", all_gather_on_gpu if on_gpu else all_gather)
            if on_gpu and hasattr(module, "reduce_scatter"):
                put(module, "reduce_scatter", reduce_scatter_on_gpu)
        if on_gpu:
            for module in (elementwise, rotation):
                for name, value in list(vars(module).items()):
                    if callable(value) and value in PLAIN:
                        put(module, name, one_kernel(recorder, name))
            put(fusion, "is_on_gpu", lambda _: True)
            put(longcat.attention, "causal_attention", flash_attention(recorder))
            put(longcat.ops.matmul, "_NATIVE_BFLOAT16", True)
            put(longcat.ops.cross_entropy, "MIN_ROWS", longcat.ops.cross_entropy.MIN_ROWS_GPU)
            put(longcat.model, "runs_again", lambda _: True)
            for module in (longcat.ops.matmul, longcat.ops.cross_entropy, longcat.ops.fp32_linear):
                put(module, "writes_float32", lambda _, dtype: dtype in (torch.bfloat16, torch.float16))
        yield
