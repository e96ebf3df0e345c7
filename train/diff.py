"""The first step, metric, layer and tensor in which two runs differ, bit by bit, whatever their layouts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longcat.errors import ConfigError
from longcat.growth import layer_of
from longcat.names import Box, pieces
from train.checkpoint.compatibility import ADDED, FIXED_KEYS, corpora_differences
from train.checkpoint.manifest import list_checkpoints, step_of
from train.checkpoint.offline_reader import Checkpoint, full_box
from train.health.state import HealthState
from train.keys.dotted import flatten
from train.loggers.jsonl import METRICS, ROUTING, step_of_row
from train.run_dir.folder import CONFIG, is_config_changed, read_config
from train.run_dir.sealed import DamagedError, intact_lines

# Depend on the machine and its load; every other metric is the same bits in a repeated run
CLOCK_METRICS = frozenset(
    {
        "replay_seconds",
        "step_seconds",
        "tokens_per_second",
        "mfu",
        "exposed_comm_share",
        "memory_gib",
        "memory_rank",
        "availability",
        "slowest_rank",
        "slowest_rank_ratio",
    }
)
OF_THE_START = ("environment.started", "environment.command")  # of two equal runs these differ
BLOCK = 1 << 24  # elements of a tensor that are in memory at a time
KINDS = {
    "weight": "weight", "exp_avg": "first moment", "exp_avg_sq": "second moment", "optimizer_step": "optimizer's step",
    "bias": "expert bias", "controller": "bias controller", "health": "health checks",
}  # fmt: skip


@dataclass(frozen=True)
class MetricDifference:
    """The first step at which metrics differ, and metric → the two values."""

    step: int
    values: dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class RoutingDifference:
    """The first step and layer at which the selections or biases of routing.jsonl differ."""

    step: int
    layer: int
    what: str  # "counts" or "bias"
    experts: list[int]  # that differ


@dataclass(frozen=True)
class TensorDifference:
    """One logical tensor whose values differ."""

    kind: str
    name: str
    num_different: int
    num_values: int
    largest: float  # absolute difference; NaN where a value is not finite

    def __str__(self) -> str:
        return (
            f"{self.name} ({KINDS.get(self.kind, self.kind)}): {self.num_different:,} of {self.num_values:,} values, "
            f"largest difference {self.largest:.2g}"
        )


@dataclass
class RunDifference:
    """What differs between two runs; all empty if they are the same bits as far as both went."""

    steps: list[int]  # that both have in metrics.jsonl
    metrics: MetricDifference | None = None
    routing: RoutingDifference | None = None
    equal_checkpoints: list[int] = field(default_factory=list)  # steps, before the first that differs
    checkpoint: int | None = None  # step of the first pair of checkpoints that differ
    tensors: list[TensorDifference] = field(default_factory=list)  # of that pair, in the order of the model
    settings: list[str] = field(default_factory=list)  # what may be the cause: configuration and environment
    changed: list[Path] = field(default_factory=list)  # files that are not those that their run wrote

    @property
    def same(self) -> bool:
        return self.metrics is None and self.routing is None and self.checkpoint is None


def compare_runs(first: Path, second: Path) -> RunDifference:
    """Compare two run folders, or two checkpoints.

    Raises:
        ConfigError: a folder is neither, or the two have no step in common.
    """
    if step_of(first) >= 0 and step_of(second) >= 0:
        tensors = list(compare_checkpoints(first, second))
        found = RunDifference([], checkpoint=step_of(first) if tensors else None, tensors=tensors)
        found.equal_checkpoints = [] if tensors else [step_of(first)]
        return found
    rows = [read_rows(folder, METRICS) for folder in (first, second)]
    common = sorted(rows[0].keys() & rows[1].keys())
    if not common:
        raise ConfigError(f"{first} and {second} have no step in common; name two runs of the same steps")
    found = RunDifference(common, compare_metrics(*rows), settings=compare_settings(first, second))
    written = [folder for folder in (first, second) if (folder / CONFIG).is_file()]
    found.changed = [folder / CONFIG for folder in written if is_config_changed(folder)]
    found.routing = compare_routing(read_rows(first, ROUTING, needed=False), read_rows(second, ROUTING, needed=False))
    saved = [{step_of(path): path for path in list_checkpoints(folder / "checkpoints")} for folder in (first, second)]
    for step in sorted(saved[0].keys() & saved[1].keys()):
        found.tensors = list(compare_checkpoints(saved[0][step], saved[1][step]))
        if found.tensors:
            found.checkpoint = step
            break
        found.equal_checkpoints.append(step)
    return found


def read_rows(folder: Path, name: str, needed: bool = True) -> dict[int, dict[str, Any]]:
    """Step → its object in a run folder's .jsonl file; lines that cannot be read are left out, as a kill leaves them.

    Raises:
        ConfigError: the file is ``needed`` and missing, or a line has changed since it was written.
    """
    try:
        lines = intact_lines(folder / name)
    except DamagedError as error:
        raise ConfigError(f"{error}; restore or remove the line") from error
    except OSError as error:
        if not needed:
            return {}
        raise ConfigError(f"{folder} is no run: {name} cannot be read ({error.strerror}); give runs/<name>") from error
    return {step: row for row in lines if (step := step_of_row(row)) is not None}


def compare_metrics(first: dict[int, dict[str, Any]], second: dict[int, dict[str, Any]]) -> MetricDifference | None:
    """The first common step with metrics that differ; a metric that only one run wrote is not compared."""
    for step in sorted(first.keys() & second.keys()):
        one, two = flatten(first[step]), flatten(second[step])
        shared = (key for key in one if key in two and not key.startswith(("start/", "starts/")))
        common = (key for key in shared if key.partition(".")[0] not in CLOCK_METRICS)
        values = {key: (one[key], two[key]) for key in common if not same_number(one[key], two[key])}
        if values:
            return MetricDifference(step, values)
    return None


def same_number(one: Any, two: Any) -> bool:
    """Equality in which NaN equals NaN."""
    both_nan = isinstance(one, float) and isinstance(two, float) and math.isnan(one) and math.isnan(two)
    return bool(one == two) or both_nan


def compare_routing(first: dict[int, dict[str, Any]], second: dict[int, dict[str, Any]]) -> RoutingDifference | None:
    for step in sorted(first.keys() & second.keys()):
        layers = min(len(row.get("counts", ())) for row in (first[step], second[step]))
        for layer in range(layers):
            for what in ("counts", "bias"):
                one, two = first[step][what][layer], second[step][what][layer]
                experts = [number for number, pair in enumerate(zip(one, two, strict=True)) if pair[0] != pair[1]]
                if experts:
                    return RoutingDifference(step, layer, what, experts)
    return None


def compare_settings(first: Path, second: Path) -> list[str]:
    """A phrase per setting that decides the bits, and per fact of the environment, that differs."""
    if not all((folder / CONFIG).is_file() for folder in (first, second)):
        return []
    stored = [read_config(folder) for folder in (first, second)]
    one, two = (ADDED | flatten(tree) for tree in stored)
    keys = (*FIXED_KEYS, "train.dtype", "train.deterministic", "parallel", "overlap", "environment")
    differing = (key for key in sorted(one.keys() | two.keys()) if one.get(key) != two.get(key))
    found = [
        f"{key}: {one.get(key)} and {two.get(key)}"
        for key in differing
        if key not in OF_THE_START and any(key == fixed or key.startswith(f"{fixed}.") for fixed in keys)
    ]
    return [*found, *corpora_differences(*stored)]


def compare_checkpoints(first: Path, second: Path) -> Iterator[TensorDifference]:
    """The logical tensors of two checkpoints whose bits differ, in the order of the model: weights and all state.

    Raises:
        ConfigError: a checkpoint is not valid, or the two are of different models.
    """
    one, two = Checkpoint(first), Checkpoint(second)
    shapes = one.shapes()
    if shapes != two.shapes():
        keys = sorted(key for key in shapes.keys() | two.shapes().keys() if shapes.get(key) != two.shapes().get(key))
        raise ConfigError(f"{first} and {second} are of different models: {keys[0]} differs in shape; name others")
    for key in sorted(shapes, key=network_order):
        yield from compare_tensor(one, two, key, shapes[key])
    yield from compare_health(one.health, two.health)


def compare_health(one: dict[str, Any] | None, two: dict[str, Any] | None) -> Iterator[TensorDifference]:
    """What differs in the state of the health checks: windows, actions, samples left out, experts without tokens."""
    states = HealthState(), HealthState()
    for state, stored in zip(states, (one, two), strict=True):
        state.restore(stored)
    for (name, first), (_, second) in zip(states[0].tensors(), states[1].tensors(), strict=True):
        if first.shape != second.shape:
            most = max(first.numel(), second.numel())
            yield TensorDifference("health", name, abs(first.numel() - second.numel()), most, math.nan)
        elif not torch.equal(as_integers(first), as_integers(second)):
            yield difference("health", name, first.numel(), first, second)


def network_order(key: str) -> tuple[int, int, str, str]:
    """Sorts by place in the network (embedding, layers, head, MTP), then by name and kind of state."""
    kind, _, name = key.partition("/")
    layer = layer_of(name)
    group = 0 if name.startswith("embed_tokens") else 1 if layer is not None else 3 if name.startswith("mtp.") else 2
    return group, -1 if layer is None else layer, name, kind


def compare_tensor(one: Checkpoint, two: Checkpoint, key: str, shape: tuple[int, ...]) -> Iterator[TensorDifference]:
    """The differing logical tensors of one stored tensor, which is read in blocks of rows."""
    kind, _, name = key.partition("/")
    merged: dict[str, TensorDifference] = {}
    for box in blocks(shape):
        values = one.read_key(key, box), two.read_key(key, box)
        if torch.equal(*(as_integers(part) for part in values)):
            continue
        for piece in pieces(name, shape, box) if shape and kind != "controller" else ():
            part = difference(kind, piece.name, math.prod(piece.shape), *(value[piece.index] for value in values))
            merged[piece.name] = added(merged.get(piece.name), part)
        if not shape or kind == "controller":
            merged[name] = added(merged.get(name), difference(kind, name, math.prod(shape), *values))
    yield from (found for found in merged.values() if found.num_different)


def blocks(shape: tuple[int, ...]) -> Iterator[Box]:
    """Boxes of consecutive rows that cover a tensor, of `BLOCK` elements or one row each."""
    if not shape or math.prod(shape) <= BLOCK:
        yield full_box(shape)
        return
    rows = max(1, BLOCK // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        yield ((start, min(start + rows, shape[0])), *full_box(shape[1:]))


def as_integers(values: Tensor) -> Tensor:
    """The bits of the values, so that NaN equals NaN and 0 differs from -0."""
    return values.view({8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[values.itemsize])


def difference(kind: str, name: str, num_values: int, one: Tensor, two: Tensor) -> TensorDifference:
    differing = int((as_integers(one) != as_integers(two)).sum())
    return TensorDifference(kind, name, differing, num_values, float((one.double() - two.double()).abs().max()))


def added(before: TensorDifference | None, part: TensorDifference) -> TensorDifference:
    """The difference of a tensor of which ``part`` is a further block."""
    if before is None:
        return part
    return TensorDifference(
        part.kind,
        part.name,
        before.num_different + part.num_different,
        part.num_values,
        max(before.largest, part.largest),
    )


def where(tensors: list[TensorDifference]) -> str:
    """How many tensors differ in each part of the network, in its order: `layer 1: 3, layers 4-6: 96 each`."""
    counts = Counter(part_of(one.name) for one in tensors)
    runs: list[tuple[str, int | None, int, int]] = []  # part, first layer, last layer, tensors in each
    for (part, layer), count in counts.items():
        if layer is not None and runs and runs[-1][0] == part and runs[-1][2:] == (layer - 1, count):
            runs[-1] = (part, runs[-1][1], layer, count)
        else:
            runs.append((part, layer, -1 if layer is None else layer, count))
    return ", ".join(
        f"{part}: {count}"
        if first is None
        else f"layer {first}: {count}"
        if first == last
        else f"layers {first}-{last}: {count} each"
        for part, first, last, count in runs
    )


def part_of(name: str) -> tuple[str, int | None]:
    """(part of the network, layer number) of a logical tensor."""
    stored = name.removeprefix("model.")
    layer = layer_of(stored)
    if layer is not None:
        return "layer", layer
    return stored.split(".")[0], None


def describe(found: RunDifference, most: int = 8) -> list[str]:
    """The lines that `longcat diff` prints; ``most`` of the tensors are named."""
    lines = []
    if found.steps:
        span = f"steps {found.steps[0]} to {found.steps[-1]}"
        verdict = "the same bits" if found.metrics is None else f"first differ at step {found.metrics.step}"
        lines.append(f"metrics      {verdict} ({len(found.steps)} steps in common, {span})")
    if found.metrics is not None:
        lines += [f"             {key}: {one} and {two}" for key, (one, two) in found.metrics.values.items()]
    if found.routing is not None:
        one = found.routing
        experts = ", ".join(map(str, one.experts[:most])) + (" …" if len(one.experts) > most else "")
        lines.append(
            f"routing      first differs at step {one.step}, layer {one.layer}: {one.what} of experts {experts}"
        )
    if found.equal_checkpoints:
        lines.append(f"checkpoints  the same bits at step {', '.join(map(str, found.equal_checkpoints))}")
    if found.checkpoint is not None:
        lines.append(
            f"checkpoints  differ at step {found.checkpoint} in {len(found.tensors)} tensors ({where(found.tensors)}):"
        )
        lines += [f"             {tensor}" for tensor in found.tensors[:most]]
        if len(found.tensors) > most:
            lines.append(f"             and {len(found.tensors) - most} more")
    lines += [f"settings     {phrase}" for phrase in found.settings] if not found.same else []
    lines += [f"settings     {path} has changed since its run wrote it" for path in found.changed]
    return lines
