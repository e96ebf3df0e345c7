"""The average of several checkpoints of a run as a new checkpoint, one tensor at a time.

Weights, routers' biases and the bias controller's state are averaged. Moments start at zero, as in an imported
checkpoint: those of an average are not the average of moments. Counters are the newest checkpoint's, so a run that
starts from the result continues with its data and schedule. Checkpoints may have different layouts.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longcat.errors import ConfigError
from longcat.json_text import dumps
from longcat.names import Box
from parallel.state_store import MOMENTS
from train.checkpoint.compatibility import TOKENIZER, differences
from train.checkpoint.files import atomic_folder, file_hash, read_text
from train.checkpoint.manifest import STATE, check_name, check_target, list_checkpoints, step_of, write_manifest
from train.checkpoint.offline_reader import Checkpoint, full_box
from train.checkpoint.streamed import LazyTensor, write, zeros
from train.health.state import grown as left_out_samples

SPARE = 16 << 20  # bytes that must be free beyond the tensors
LARGEST_WEIGHT = 1e6
AVERAGED, STEPS = ("weight", "bias", "controller"), "optimizer_step"


@dataclass
class MergeConfig:
    """Options of `longcat merge`."""

    # checkpoints of one run, separated by commas, at least two; a run folder stands for all of its checkpoints
    source: str = ""
    target: str = ""  # the merged checkpoint's folder; it must not exist
    weights: str = (
        ""  # one number for each checkpoint, separated by commas, a run's in the order of steps; empty = equal
    )
    last: int = 0  # take only so many checkpoints with the highest steps; 0 = all

    def validate(self) -> None:
        """Raise ConfigError for what is wrong without a look at the checkpoints."""
        for name in ("source", "target"):
            if not getattr(self, name):
                raise ConfigError(f"longcat merge needs {name}=…; say longcat merge source=RUN target=DIR")
        if self.last < 0 or self.last == 1:
            raise ConfigError(f"last={self.last} leaves nothing to average; use 2 or more, or 0 for all")


@dataclass(frozen=True)
class WeightedCheckpoint:
    """A valid checkpoint and its share of the average; the shares need not add up to 1."""

    checkpoint: Checkpoint
    weight: float

    @property
    def step(self) -> int:
        return self.checkpoint.counters["step"]


def merge(config: MergeConfig) -> list[WeightedCheckpoint]:
    """Write the average of ``config.source`` to ``config.target``; returns what was averaged, by step.

    Raises:
        ConfigError: fewer than two checkpoints, one is damaged or of another model, or of weights that do not fit; the
            target exists, has a name that a run would misunderstand, or does not fit on the disk.
    """
    config.validate()
    target = Path(config.target)
    check_target(target)
    folders = find_folders(config)
    weights = read_weights(config.weights, len(folders))
    sources = [WeightedCheckpoint(Checkpoint(folder), weight) for folder, weight in zip(folders, weights, strict=True)]
    sources.sort(key=lambda source: source.step)
    check_alike(sources)
    check_not_of_the_run(target, sources)
    with atomic_folder(target) as partial:
        check_disk_space(partial, sources[-1].checkpoint)
        write(merged_state(sources), partial)
        files = {path.name: file_hash(path) for path in sorted(partial.glob("*.distcp"))}
        write_manifest(partial, dumps(state_of(sources)), files)
    return sources


def find_folders(config: MergeConfig) -> list[Path]:
    """The folders of the checkpoints that ``config`` names, in its order, a run's by step."""
    found: list[Path] = []
    for word in config.source.split(","):
        path = Path(word.strip())
        if not word.strip() or not path.is_dir():
            raise ConfigError(f"source={word.strip()} is no folder; name checkpoints or a run, separated by commas")
        inside = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        found += list_checkpoints(inside) or [path]
    if config.last:
        newest = sorted(found, key=stored_step)[-config.last :]
        found = [path for path in found if path in newest]
    different = {path.resolve() for path in found}
    if len(different) < len(found):
        raise ConfigError(f"source={config.source} names a checkpoint twice; give it a weight instead")
    if len(found) < max(2, config.last):
        raise ConfigError(
            f"source={config.source} has {len(found)} checkpoint{'s' * (len(found) != 1)}, and an average needs at "
            f"least {max(2, config.last)}; train with checkpoint.keep=0, which keeps all"
        )
    return found


def stored_step(folder: Path) -> int:
    """The step of a checkpoint, whatever its folder is called; -1 where it cannot be read, which is refused later."""
    try:
        return int(json.loads(read_text(folder / STATE))["counters"]["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return -1


def read_weights(text: str, count: int) -> list[float]:
    """The weights that ``text`` lists, or 1 for each of ``count`` checkpoints."""
    if not text:
        return [1.0] * count
    try:
        weights = [float(word) for word in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"weights={text} must be numbers, separated by commas, such as 1,1,2") from error
    if len(weights) != count:
        raise ConfigError(f"weights={text} are {len(weights)} numbers for {count} checkpoints; give one for each")
    if any(not math.isfinite(weight) or weight <= 0 for weight in weights):
        raise ConfigError(f"weights={text} must be finite and above 0; leave out a checkpoint that has no share")
    if not 1 / LARGEST_WEIGHT <= min(weights) <= max(weights) <= LARGEST_WEIGHT:
        raise ConfigError(f"weights={text} must be from 1e-6 to 1e6, as float32 sums need; divide all by their largest")
    return weights


def check_alike(sources: list[WeightedCheckpoint]) -> None:
    """Raise ConfigError unless all are of one model and tokenizer, and store the same tensors."""
    first, *others = (source.checkpoint for source in sources)
    for other in others:
        wrong = differences(settings(first), settings(other), ("model", "balance.method", TOKENIZER))
        shapes = [{key: tuple(stored.size) for key, stored in stored_tensors(one).items()} for one in (first, other)]
        if not wrong and shapes[0] != shapes[1]:
            key = min(key for key in shapes[0] | shapes[1] if shapes[0].get(key) != shapes[1].get(key))
            wrong = [f"{key} had shape {shapes[0].get(key)} and now has {shapes[1].get(key)}"]
        if wrong:
            raise ConfigError(f"{first.folder} and {other.folder} are of different models: {'; '.join(wrong)}")
    for key in stored_tensors(first):
        if key.partition("/")[0] not in (*AVERAGED, *MOMENTS, STEPS):
            raise ConfigError(f"{first.folder} contains {key}, which a merge does not know; other code wrote it")


def stored_tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    """Key → torch's index entry of each stored tensor."""
    return dict(checkpoint.metadata.state_dict_metadata)


def settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """The part of a configuration that checkpoints of one average share."""
    return checkpoint.configuration | {"model": dataclasses.asdict(checkpoint.model)}


def check_not_of_the_run(target: Path, sources: list[WeightedCheckpoint]) -> None:
    """Raise ConfigError where a run would take the average for one of its own checkpoints, or of another step."""
    check_name(target, sources[-1].step)
    for source in sources:
        folder = source.checkpoint.folder
        if step_of(target) >= 0 and target.resolve().parent == folder.resolve().parent:
            raise ConfigError(f"target={target} would be one of the run's own checkpoints; choose another folder")


def check_disk_space(folder: Path, checkpoint: Checkpoint) -> None:
    stored = stored_tensors(checkpoint).values()
    needed = sum(math.prod(one.size) * one.properties.dtype.itemsize for one in stored)
    free = shutil.disk_usage(folder).free
    if needed + SPARE > free:
        raise ConfigError(
            f"the merged checkpoint takes {needed / 2**30:.2f} GiB and {folder.parent} has {free / 2**30:.2f} GiB "
            f"free; choose another target"
        )


def merged_state(sources: list[WeightedCheckpoint]) -> dict[str, Tensor]:
    """The merged state under a checkpoint's keys; the large tensors are computed when they are written."""
    newest = sources[-1].checkpoint
    lock = threading.Lock()  # threads write files, and one tensor at a time is averaged
    tensors: dict[str, Tensor] = {}
    for key, stored in stored_tensors(newest).items():
        kind, _, name = key.partition("/")
        shape, dtype = tuple(stored.size), stored.properties.dtype
        boxes = newest.boxes(name, shape) if kind in ("weight", *MOMENTS) else [full_box(shape)]
        if kind == "weight":
            tensors[key] = LazyTensor.of(shape, boxes, averaging(sources, key, lock), dtype)
        elif kind in MOMENTS:
            tensors[key] = LazyTensor.of(shape, boxes, zeros)
        elif kind == STEPS:
            tensors[key] = torch.zeros(shape, dtype=dtype)
        elif dtype.is_floating_point:
            tensors[key] = average(sources, key, boxes[0])
        else:  # the controller's count of steps
            tensors[key] = newest.read_key(key, boxes[0])
    return tensors


def averaging(sources: list[WeightedCheckpoint], key: str, lock: threading.Lock) -> Callable[[Box], Tensor]:
    """A function that averages a box of a stored tensor."""

    def make(box: Box) -> Tensor:
        with lock:
            return average(sources, key, box)

    return make


def average(sources: list[WeightedCheckpoint], key: str, box: Box) -> Tensor:
    """Σ wᵢ·xᵢ / Σ wᵢ of a box, summed in the order of steps in float32 (float64 where that is stored); its dtype."""
    total: Tensor | None = None
    for source in sources:
        values = source.checkpoint.read_key(key, box)
        dtype = values.dtype
        term = values.to(torch.promote_types(dtype, torch.float32)).mul_(source.weight)
        total = term if total is None else total.add_(term)
    assert total is not None
    return total.div_(sum(source.weight for source in sources)).to(dtype)


def state_of(sources: list[WeightedCheckpoint]) -> dict[str, Any]:
    """state.json of the average: the newest checkpoint's counters and configuration, and where it comes from."""
    newest = sources[-1].checkpoint
    origin = [
        {"source": str(source.checkpoint.folder), "step": source.step, "weight": source.weight} for source in sources
    ]
    return {
        "counters": newest.counters,
        "configuration": newest.configuration,
        "health": left_out_samples(newest.health),
        "merged": origin,
    }
