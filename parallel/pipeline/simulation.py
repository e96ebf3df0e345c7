"""Simulates a pipeline schedule: when each action runs, how long ranks are idle, how many micro-batches are alive.

The actions are torch's own, taken from its schedule objects; the caller gives their seconds, measured or assumed.
Sending takes no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch.distributed.pipelining import (
    ScheduleDualPipeV,
    ScheduleInterleaved1F1B,
    ScheduleZBVZeroBubble,
)

from parallel.config import Schedule
from parallel.pipeline.stages import STAGES_PER_RANK, num_stages, stages_of

SCHEDULES: dict[str, Any] = {
    "interleaved": ScheduleInterleaved1F1B,
    "zbv": ScheduleZBVZeroBubble,
    "dualpipev": ScheduleDualPipeV,
}


class Action(NamedTuple):
    """One computation of one stage. Kinds: F forward, I input gradient, W weight gradient, B = I and W in one."""

    kind: str
    stage: int
    micro_batch: int


Orders = dict[int, list[Action]]  # per rank
Seconds = Callable[[int, Action], float]  # of an action on a rank


@dataclass(frozen=True)
class Simulation:
    """Start and end of every action, per rank."""

    spans: dict[int, list[tuple[Action, float, float]]]  # (action, start, end)
    stages_per_rank: int

    @property
    def seconds(self) -> float:
        """The time of a step: from the first start on any rank to the last end on any."""
        return max(end for spans in self.spans.values() for _, _, end in spans)

    @property
    def busy(self) -> float:
        """Mean over ranks of the seconds they compute."""
        return sum(end - start for spans in self.spans.values() for _, start, end in spans) / len(self.spans)

    @property
    def bubble(self) -> float:
        """Share of the step in which a rank is idle, on average."""
        return 1 - self.busy / self.seconds

    @property
    def idle(self) -> float:
        """Seconds of the step in which a rank is idle, on average."""
        return self.seconds - self.busy

    @property
    def idle_inside(self) -> float:
        """Seconds in which a rank is idle between its own first start and last end; the worst rank's.

        Papers count this way: it ignores that ranks start and end at different times.
        """
        return max(
            spans[-1][2] - spans[0][1] - sum(end - start for _, start, end in spans) for spans in self.spans.values()
        )

    @property
    def live_micro_batches(self) -> float:
        """The most micro-batches whose activations a rank holds at once, from a forward's start to the end of its last
        gradient; one of a rank's two stages counts as half a micro-batch."""
        return max(_most_live(spans) for spans in self.spans.values()) / self.stages_per_rank


def _most_live(spans: list[tuple[Action, float, float]]) -> int:
    live = most = 0
    for action, _, _ in spans:
        live += action.kind == "F"
        most = max(most, live)
        live -= action.kind in "BW"
    return most


@lru_cache(maxsize=8)  # torch's schedule takes a quarter of a second for ten ranks
def planned(schedule: Schedule, pp: int, num_micro_batches: int) -> Orders:
    """The actions of each rank in the order in which torch's schedule runs them; no process group is needed."""
    if schedule == "1f1b":
        return {rank: _order_of_1f1b(pp - rank, rank, num_micro_batches) for rank in range(pp)}
    stages = [
        SimpleNamespace(
            stage_index=stage,
            num_stages=num_stages(schedule, pp),
            group_size=pp,
            group_rank=0,
            submod=None,
            is_last=False,
        )
        for stage in stages_of(schedule, pp, 0)
    ]
    torch_schedule = SCHEDULES[schedule](stages, num_micro_batches)
    orders = torch_schedule.pipeline_order
    return {rank: [one for action in order for one in _flat(action)] for rank, order in orders.items()}


def _order_of_1f1b(ahead: int, stage: int, num_micro_batches: int) -> list[Action]:
    """The order of torch's loop; its schedule object's own list numbers the last rank's forwards from 1."""
    ahead = min(ahead, num_micro_batches)
    order = [Action("F", stage, number) for number in range(ahead)]
    for number in range(num_micro_batches):
        order.append(Action("B", stage, number))
        if number + ahead < num_micro_batches:
            order.append(Action("F", stage, number + ahead))
    return order


def _flat(action: Any) -> Iterator[Action]:
    if action is None:
        return
    if action.sub_actions:
        for part in action.sub_actions:
            yield from _flat(part)
    elif action.computation_type.value in ("F", "I", "W", "B"):
        yield Action(action.computation_type.value, action.stage_index, action.microbatch_index)


def simulate(schedule: Schedule, orders: Orders, seconds: Seconds) -> Simulation:
    """Run every rank's actions in its order, each as soon as its inputs exist.

    A forward needs the previous stage's forward. A backward needs this stage's forward and the next stage's backward.
    Weight gradients need their own input gradients.

    Raises:
        RuntimeError: the orders wait for each other.
    """
    ends: dict[tuple[str, int, int], float] = {}
    positions, clocks = dict.fromkeys(orders, 0), dict.fromkeys(orders, 0.0)
    spans: dict[int, list[tuple[Action, float, float]]] = {rank: [] for rank in orders}
    last = num_stages(schedule, len(orders)) - 1
    while any(positions[rank] < len(orders[rank]) for rank in orders):
        progressed = False
        for rank, order in orders.items():
            while positions[rank] < len(order):
                action = order[positions[rank]]
                needs = _needs(action, last)
                if not all(need in ends for need in needs):
                    break
                start = max([clocks[rank], *(ends[need] for need in needs)])
                end = start + seconds(rank, action)
                spans[rank].append((action, start, end))
                clocks[rank] = end
                positions[rank] += 1
                progressed = True
                if action.kind != "W":
                    ends["F" if action.kind == "F" else "I", action.stage, action.micro_batch] = end
        if not progressed:
            raise RuntimeError(f"the ranks of {schedule} wait for each other")
    return Simulation(spans, STAGES_PER_RANK[schedule])


def _needs(action: Action, last: int) -> list[tuple[str, int, int]]:
    kind, stage, micro_batch = action
    if kind == "F":
        return [("F", stage - 1, micro_batch)] if stage else []
    if kind == "W":
        return [("I", stage, micro_batch)]
    next_stage = [("I", stage + 1, micro_batch)] if stage < last else []
    return [("F", stage, micro_batch), *next_stage]


def theory(schedule: Schedule, pp: int, forward: float, inputs: float, weights: float) -> float:
    """Seconds of a step in which a rank is idle, by formula.

    The three times are those of one micro-batch in all stages of a rank. 1F1B and interleaved: Narayanan et al. 2021,
    micro-batches a multiple of ``pp``. Zero-bubble V (Qi et al. 2024): derived from its order, for weights <= forward
    <= inputs and at least 2 pp - 1 micro-batches; at equal times a rank is idle only before its first start or after
    its last end. DualPipeV: DeepSeek-AI 2025, for a forward and a backward that gain nothing by running together, an
    upper bound.
    """
    total = forward + inputs + weights
    idle = {
        "1f1b": total,
        "interleaved": total / 2,
        "zbv": inputs / 2,
        "dualpipev": (forward + 2 * inputs - weights) / 2,
    }
    return (pp - 1) * idle[schedule]
