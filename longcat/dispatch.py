"""The way of tokens to their FFN experts and back: the interface, and its one-process version.

Both ways are a start, which returns at once, and a wait, so that what stands between them covers the exchange. How
many rows go where, the host learns from the device: `start` sends these sizes ahead, `send` is the last moment for the
rows themselves. Where the host only queues work, it queues what covers the sizes in between.
"""

# T tokens, K chosen, D width, P rows for the experts that are here, E experts that are here

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longcat.ops.grouped import padded_capacity
from longcat.ops.permute import Permutation, combine, permute, plan_permutation


class Routing(NamedTuple):
    """Where the tokens of one chunk go: what a router says."""

    indices: Tensor  # [T, K] expert numbers below N + Z; those from N on are identity experts
    gates: Tensor  # [T, K] float32, γ·R of each choice
    num_experts: int  # N
    num_routed: int  # N + Z


class Dispatcher(Protocol):
    """Moves tokens to the processes of their FFN experts. Identity experts are served where the token is."""

    def start(self, chunks: list[tuple[Tensor, Routing]]) -> list[Any]:
        """Start sending the tokens x [T, D] of some chunks → pending, for each chunk."""

    def send(self, pending: Any) -> None:
        """Send what `start` has not sent yet, because the host would have had to wait."""

    def wait(self, pending: Any) -> tuple[Tensor, Tensor]:
        """→ rows [P, D] for the experts that are here, sorted by expert, and how many each has [E].

        Rows of nobody may be among them, behind an expert's own: nothing that comes of them is used.
        """

    def start_back(self, rows: Tensor, pending: Any) -> Any:
        """Start the way back of the experts' results, in the order that `wait` gave → pending."""

    def wait_back(self, pending: Any) -> Tensor:
        """→ Σ over each token's choices of gate · result, identity experts among them, [T, D]."""


@dataclass
class LocalPending:
    """Between the calls of `LocalDispatcher`."""

    x: Tensor
    routing: Routing
    num_rows: Callable[[], int]
    plan: Permutation | None = None
    rows: Tensor | None = None


class LocalDispatcher:
    """Every expert is here.

    Args:
        to_host: starts copying integers to the host → what waits for them.
    """

    def __init__(self, to_host: Callable[[Tensor], Callable[[], list[int]]] = lambda values: values.tolist) -> None:
        self.to_host = to_host

    def start(self, chunks: list[tuple[Tensor, Routing]]) -> list[LocalPending]:
        numbers = cache(self.to_host(torch.stack([(one.indices < one.num_experts).sum() for _, one in chunks])))
        return [
            LocalPending(x, routing, lambda number=number: numbers()[number])  # type: ignore[misc]
            for number, (x, routing) in enumerate(chunks)
        ]

    def send(self, pending: LocalPending) -> None:
        if pending.plan is None:
            routing = pending.routing
            plan = plan_permutation(routing.indices, routing.num_experts, routing.num_routed, pending.num_rows())
            room = padded_capacity(plan.counts[: routing.num_experts], pending.x)
            plan = plan if room is None else plan.pad_to_capacity(room, routing.num_experts)
            pending.plan, pending.rows = plan, permute(pending.x, plan)

    def wait(self, pending: LocalPending) -> tuple[Tensor, Tensor]:
        self.send(pending)
        assert pending.plan is not None and pending.rows is not None
        return pending.rows, pending.plan.counts[: pending.routing.num_experts]

    def start_back(self, rows: Tensor, pending: LocalPending) -> LocalPending:
        pending.rows = rows
        return pending

    def wait_back(self, pending: LocalPending) -> Tensor:
        assert pending.plan is not None and pending.rows is not None
        return combine(pending.rows, pending.routing.gates, pending.plan, pending.x)
