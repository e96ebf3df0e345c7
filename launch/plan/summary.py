"""What a rank's trace says, as named numbers, so that traces of two and of three layers extend to any depth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from launch.plan.trace import Traced
from parallel.config import ParallelConfig
from parallel.mesh import MeshSizes
from parallel.pipeline.stages import SPLIT_BACKWARD
from parallel.plan.recorder import INNER, OUTSIDE, Phase
from parallel.watchdog.events import SpanKind

FEW = 2  # layers of the smaller trace; the other has one more
ACTIONS = {"F": "forward", "B": "backward", "I": "input_gradients", "W": "weight_gradients"}
TOKEN_BYTES = 17  # id, label and whether it counts

Numbers = dict[tuple[str | int, ...], float]


@dataclass(frozen=True)
class Summary:
    """One rank's numbers, by what they count.

    ("state",) bytes of weights and moments; ("start",) those and the step's buffers; ("end",) the most after the last
    phase; ("peak", …) bytes at points of the step; ("before" or "after", stage, phase, which) bytes around the phase of
    the first or the last micro-batch that was traced; ("flops" or "seconds", stage, phase) of one micro-batch; ("bytes"
    or "count", stage, phase, kind) of messages, with "root" in front those of FSDP2's root unit; ("step bytes" or
    "step count", kind) of all that was traced. A stage is its number among the rank's own; stage -1 is what is outside
    phases, of a whole step.
    """

    numbers: Numbers
    layers: tuple[int, ...]
    micro_batches: int
    place: int = 0  # in the pipeline, of the rank that was traced

    def of(self, *key: str | int) -> float:
        return self.numbers.get(key, 0.0)


def summarise(traced: Traced, place: int = 0) -> Summary:
    """The numbers of a trace of the pipeline's rank ``place``."""
    stages = sorted({phase.layers for phase in traced.phases if phase.layers is not None})
    numbers: defaultdict[tuple[str | int, ...], float] = defaultdict(float)
    numbers["state",] = traced.state
    first = next((work for phase, work in traced.phases.items() if phase != OUTSIDE), None)
    numbers["end",] = traced.end
    numbers["start",] = traced.state if first is None else first.before
    last = traced.num_micro_batches
    for phase, work in traced.phases.items():
        stage = _stage(phase, stages)
        if phase == OUTSIDE:
            numbers["flops", -1, ""], numbers["seconds", -1, ""] = work.flops, work.seconds
            numbers["peak", -1, "", 0, "all"] = work.peak
            continue
        which = {1: "first", last: "last"}.get(phase.micro_batch or 1)
        if which is None:
            continue
        for name in ["first", "last"] if last == 1 else [which]:
            numbers["before", stage, phase.kind, name] = work.before
            numbers["after", stage, phase.kind, name] = work.after
            for position, peak in work.peaks.items():
                if position != INNER:  # between those of the first and the last layer
                    numbers["peak", stage, phase.kind, name, position] = peak
        if phase.micro_batch == last:
            numbers["flops", stage, phase.kind], numbers["seconds", stage, phase.kind] = work.flops, work.seconds
    for (kind, phase), traffic in traced.traffic.items():
        if kind == SpanKind.WEIGHT_ALL_GATHER:  # a pipeline's stages gather with their first micro-batch and keep all
            numbers["step bytes", kind.value] += traffic.num_bytes
            numbers["step count", kind.value] += traffic.count
        if phase == OUTSIDE or phase.micro_batch == last:
            numbers["bytes", _stage(phase, stages), phase.kind, kind.value] += traffic.num_bytes
            numbers["count", _stage(phase, stages), phase.kind, kind.value] += traffic.count
            numbers["root bytes", _stage(phase, stages), phase.kind, kind.value] += traffic.root_bytes
            numbers["root count", _stage(phase, stages), phase.kind, kind.value] += traffic.root_count
    return Summary(dict(numbers), traced.layers, last, place)


def _stage(phase: Phase, stages: list[tuple[int, int]]) -> int:
    if phase == OUTSIDE:
        return -1
    return 0 if phase.layers is None else stages.index(phase.layers)


def extend(few: Summary, more: Summary, layers: Sequence[int]) -> Summary:
    """Two traces, the second with one layer more in each of its longer stages, extended to ``layers`` of each stage.

    Layers are alike, so every number is a straight line over their count.
    """
    added = [i for i, (one, other) in enumerate(zip(few.layers, more.layers, strict=True)) if other > one]
    beyond = [layers[i] - more.layers[i] for i in added]
    times = sum(beyond) / max(len(beyond), 1)
    numbers = {key: value + times * (value - few.numbers.get(key, value)) for key, value in more.numbers.items()}
    return Summary(numbers, tuple(layers), more.micro_batches, more.place)


def between(low: Summary, high: Summary, share: float) -> Summary:
    """Numbers that are ``share`` of the way from ``low`` to ``high``."""
    keys = low.numbers.keys() | high.numbers.keys()
    numbers = {key: low.of(*key) + share * (high.of(*key) - low.of(*key)) for key in keys}
    return Summary(numbers, low.layers, low.micro_batches, low.place)


def peak_bytes(
    summary: Summary, parallel: ParallelConfig, sizes: MeshSizes, place: int, micro_batches: int, hidden_bytes: float
) -> float:
    """Most bytes that live in a step of ``micro_batches`` on the pipeline's rank ``place``.

    Without a pipeline the second micro-batch is like all that follow. A pipeline's actions are followed in the order of
    its schedule: each adds what it was traced to add.
    """
    peaks = [value for key, value in summary.numbers.items() if key[0] == "peak"]
    if sizes.pp == 1 or (micro_batches == summary.micro_batches and place == summary.place):
        return max(peaks)
    from parallel.pipeline.simulation import planned  # imports torch's compiler

    stages = sorted({key[1] for key in summary.numbers if key[0] == "before"})
    per_rank = planned(parallel.schedule, sizes.pp, micro_batches)[place]
    own = sorted({action.stage for action in per_rank})
    assert len(own) == len(stages)
    receives = sum((stage > 0) + (stage < _last_stage(parallel, sizes.pp)) for stage in own)
    now = summary.of("start") + (micro_batches - summary.micro_batches) * receives * hidden_bytes
    highest = now
    for action in per_rank:
        stage, kind = own.index(action.stage), ACTIONS[action.kind]
        which = "first" if action.micro_batch == 0 else "last"
        before = summary.of("before", stage, kind, which)
        top = max(v for k, v in summary.numbers.items() if k[:4] == ("peak", stage, kind, which))
        highest = max(highest, now + top - before)
        now += summary.of("after", stage, kind, which) - before
    return max(highest, summary.of("end"))  # between phases the traced rank may have had more micro-batches under way


def _last_stage(parallel: ParallelConfig, pp: int) -> int:
    from parallel.pipeline.stages import num_stages

    return num_stages(parallel.schedule, pp) - 1


def backward_kinds(parallel: ParallelConfig, pp: int) -> tuple[str, ...]:
    """The phases of a backward."""
    split = pp > 1 and parallel.schedule in SPLIT_BACKWARD
    return (SpanKind.INPUT_GRADIENTS.value, SpanKind.WEIGHT_GRADIENTS.value) if split else (SpanKind.BACKWARD.value,)
