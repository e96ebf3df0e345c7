"""Dispatch of tokens to their FFN experts and combine of the results: the interface, and its one-process version.

Dispatch and combine are each a start, which returns at once, and a wait, so that the computation between them overlaps
the communication. The host needs the numbers of rows from the device. So `start_dispatch` exchanges these sizes first,
and `send_rows` sends the rows that it could not send yet; a host that runs ahead of its GPU queues other work in
between.
"""

# T tokens, K selections per token, D width, P rows for the local experts, E local experts

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longcat.ops.grouped import padded_capacity
from longcat.ops.permute import Permutation, combine, log_gates, permute, plan_permutation
from longcat.ops.recomputed import recomputable
from longcat.recompute_values import Value


class Routing(NamedTuple):
    """A router's decision for one chunk of tokens."""

    indices: Tensor  # [T, K] expert numbers below ``num_routed``; those from N on are identity experts
    gates: Tensor  # [T, K] float32, γ·R of each selection; 0 at padding
    num_experts: int  # N
    num_routed: int  # N + Z; where samples may be padded one more, an identity expert for padding alone


class Dispatcher(Protocol):
    """Moves tokens to the ranks of their FFN experts. Identity experts are computed on the token's own rank."""

    def start_dispatch(self, chunks: list[tuple[Tensor, Routing]]) -> list[Any]:
        """Start sending the tokens x [T, D] of each chunk → its pending state."""

    def send_rows(self, pending: Any) -> None:
        """Send the rows if `start_dispatch` did not, to spare the host a wait for their number."""

    def wait_dispatch(self, pending: Any) -> tuple[Tensor, Tensor, Tensor]:
        """→ rows [P, D] for the local experts, sorted by expert, the number of each expert's rows [E], `log_gates` [P].

        Padding rows may follow an expert's own rows: their results are not used.
        """

    def start_combine(self, rows: Tensor, pending: Any) -> Any:
        """Start sending back the experts' results, in the order of `wait_dispatch` → the pending state."""

    def wait_combine(self, pending: Any) -> Tensor:
        """→ Σ over each token's selections of gate · result, including identity experts, [T, D]."""


@dataclass
class LocalPending:
    """The state between the calls of `LocalDispatcher`."""

    x: Tensor
    routing: Routing
    num_rows: Callable[[], int]
    plan: Permutation | None = None
    rows: Tensor | None = None


class LocalDispatcher:
    """The dispatcher of one process: every expert is local.

    Args:
        to_host: starts copying integers to the host → a function that waits for them.
    """

    def __init__(self, to_host: Callable[[Tensor], Callable[[], list[int]]] = lambda values: values.tolist) -> None:
        self.to_host = to_host

    def start_dispatch(self, chunks: list[tuple[Tensor, Routing]]) -> list[LocalPending]:
        counts = torch.stack([(routing.indices < routing.num_experts).sum() for _, routing in chunks])
        wait_for_counts = cache(self.to_host(counts))

        def pending(number: int, x: Tensor, routing: Routing) -> LocalPending:
            return LocalPending(x, routing, lambda: wait_for_counts()[number])

        return [pending(number, *chunk) for number, chunk in enumerate(chunks)]

    def send_rows(self, pending: LocalPending) -> None:
        if pending.plan is None:
            routing = pending.routing
            plan = plan_permutation(routing.indices, routing.num_experts, routing.num_routed, pending.num_rows())
            capacity = padded_capacity(plan.counts[: routing.num_experts], pending.x)
            plan = plan if capacity is None else plan.pad_to_capacity(capacity, routing.num_experts)
            pending.plan, pending.rows = plan, recomputable(Value.expert_input, permute, pending.x, plan)

    def wait_dispatch(self, pending: LocalPending) -> tuple[Tensor, Tensor, Tensor]:
        self.send_rows(pending)
        assert pending.plan is not None and pending.rows is not None
        counts = pending.plan.counts[: pending.routing.num_experts]
        return pending.rows, counts, log_gates(pending.routing.gates, pending.plan, pending.x.dtype)

    def start_combine(self, rows: Tensor, pending: LocalPending) -> LocalPending:
        pending.rows = rows
        return pending

    def wait_combine(self, pending: LocalPending) -> Tensor:
        assert pending.plan is not None and pending.rows is not None
        return combine(pending.rows, pending.routing.gates, pending.plan, pending.x)
