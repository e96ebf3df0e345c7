"""Growth of a checkpoint in depth: bytes are copied under new names, and no layer is ever in memory.

A checkpoint's shards are sequences of records, one per box of a stored tensor, with an index of their locations. The
grown checkpoint repeats the records of a layer as often as the layer: weights, moments and biases are bitwise the old
ones, in the boxes of the old run's layout, and any layout loads them. Only the bias controller's tensors, which cover
all layers, are read, and repeated row by row.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longcat.errors import ConfigError
from longcat.growth import Growth, GrowthMethod, layer_of
from longcat.json_text import dumps
from train.checkpoint.files import HashedFile, atomic_folder, read_text
from train.checkpoint.find import find_valid
from train.checkpoint.manifest import STATE, check_name, check_target, step_of, write_manifest
from train.checkpoint.offline_reader import report_skipped
from train.health.state import grown as grown_health

BUFFER = 1 << 20  # bytes copied at a time
SPARE = 16 << 20  # bytes that must be free beyond the tensors: the index and the state
# Kinds of state: with tensors of one layer or of none, and with one tensor [L, …] for all layers
PER_LAYER, ALL_LAYERS = ("weight", "exp_avg", "exp_avg_sq", "optimizer_step", "bias"), "controller"


@dataclass
class GrowthOptions:
    """How often and in which order layers are repeated."""

    factor: int = 2  # how often each layer is repeated; at least 2
    # stack = the whole stack again, layers 0 1 0 1 (as the technical report); interpose = each in place again, 0 0 1 1
    method: GrowthMethod = GrowthMethod.stack


@dataclass
class GrowConfig:
    """Options of `longcat grow`."""

    source: str = ""  # a checkpoint's folder, or a run folder for its newest valid one; written in any layout
    target: str = ""  # the grown checkpoint's folder; it must not exist
    growth: GrowthOptions = field(default_factory=GrowthOptions)

    def validate(self) -> None:
        for name in ("source", "target"):
            if not getattr(self, name):
                raise ConfigError(f"longcat grow needs {name}=DIR; say longcat grow source=DIR target=DIR")
        Growth(1, self.growth.factor, self.growth.method).validate()


@dataclass(frozen=True)
class GrowthSource:
    """A valid checkpoint, and how it grows."""

    folder: Path
    state: dict[str, Any]  # state.json
    metadata: Any  # torch's index of the shards
    records: dict[str, list[tuple[Any, Any]]]  # key → (box, location) of each record
    growth: Growth


def grow(config: GrowConfig) -> tuple[Path, Growth]:
    """Write the grown checkpoint of ``config.source`` to ``config.target``.

    Returns the source checkpoint and how it grew.

    Raises:
        ConfigError: the source is no valid checkpoint with a known state, the target exists, or the disk is too small.
    """
    config.validate()
    target = Path(config.target)
    check_target(target)
    folder, skipped = find_valid(Path(config.source))
    report_skipped(skipped, folder)
    source = read_source(folder, config.growth)
    check_name(target, source.state["counters"]["step"])
    check_not_of_the_run(target, source)
    with atomic_folder(target) as partial:
        check_disk_space(partial, source)
        write(source, partial)
    return source.folder, source.growth


def check_not_of_the_run(target: Path, source: GrowthSource) -> None:
    """Raise ConfigError where the shallow run would take the grown checkpoint for one of its own."""
    if step_of(target) >= 0 and target.resolve().parent == source.folder.resolve().parent:
        raise ConfigError(f"target={target} would be one of the shallow run's own checkpoints; choose another folder")


def check_disk_space(folder: Path, source: GrowthSource) -> None:
    needed = sum(
        location.length * len(grown_keys(source.growth, key))
        for key, records in source.records.items()
        for _, location in records
    )
    free = shutil.disk_usage(folder).free
    if needed + SPARE > free:
        raise ConfigError(
            f"the grown checkpoint takes {needed / 2**30:.2f} GiB and {folder.parent} has {free / 2**30:.2f} GiB free; "
            f"choose another target"
        )


def read_source(folder: Path, options: GrowthOptions) -> GrowthSource:
    """The state and the index of a valid checkpoint; none of its tensors."""
    from train.checkpoint.shards import ShardReader

    try:
        state = json.loads(read_text(folder / STATE))
        num_layers = int(state["configuration"]["model"]["num_layers"])
        int(state["counters"]["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"source={folder}: {STATE} does not say the model and the step; name another") from error
    metadata = ShardReader(folder).read_metadata()
    check_known_state(metadata.state_dict_metadata, num_layers, folder)
    records = defaultdict(list)
    for index, location in metadata.storage_data.items():
        records[index.fqn].append((index, location))
    return GrowthSource(folder, state, metadata, dict(records), Growth(num_layers, options.factor, options.method))


def check_known_state(tensors: dict[str, Any], num_layers: int, folder: Path) -> None:
    """Raise ConfigError for an unknown kind of state or missing layers, which would be repeated wrongly."""
    layers = set()
    for key, stored in tensors.items():
        kind, _, name = key.partition("/")
        if kind in PER_LAYER:
            layers.add(layer_of(name))
        elif kind != ALL_LAYERS or not one_box_by_layer(stored, num_layers):
            raise ConfigError(f"source={folder} contains {key}, which growth does not know; other code wrote it")
    if layers - {None} != set(range(num_layers)):
        raise ConfigError(f"source={folder} does not contain the {num_layers} layers of its {STATE}; name another")


def one_box_by_layer(stored: Any, num_layers: int) -> bool:
    """Whether a tensor is stored in one box and has a row per layer, or is a scalar."""
    return len(stored.chunks) == 1 and (not stored.size or stored.size[0] == num_layers)


def grown_keys(growth: Growth, key: str) -> list[str]:
    """`kind/stored name` → its keys in the grown checkpoint."""
    kind, _, name = key.partition("/")
    return [f"{kind}/{grown}" for grown in growth.grown_names(name)] if kind in PER_LAYER else [key]


def blocks(source: GrowthSource) -> list[list[tuple[str, str]]]:
    """(old key, grown key) of everything outside the stack, then of each new layer."""
    found = defaultdict(list)
    for key in sorted(source.records):
        for grown in grown_keys(source.growth, key):
            layer = layer_of(grown.partition("/")[2])
            found[-1 if layer is None else layer].append((key, grown))
    return [found[layer] for layer in sorted(found)]


def write(source: GrowthSource, partial: Path) -> None:
    """Write shards (one file per block), index, state and manifest into ``partial``."""
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint.storage import WriteResult

    repeated = repeated_rows(source)
    tensors: dict[str, Any] = {}
    results, hashes = [], {}
    for number, pairs in enumerate(blocks(source)):
        name = f"__{number}_0.distcp"
        with HashedFile(partial / name) as file:
            for key, grown in pairs:
                tensors[grown] = source.metadata.state_dict_metadata[key]
                if key in repeated:
                    tensors[grown] = of_one_box(tensors[grown], repeated[key])
                for index, location in source.records[key]:
                    start = file.tell()
                    if key in repeated:
                        record = io.BytesIO()
                        torch.save(repeated[key], record)
                        file.write(record.getvalue())
                    else:
                        copy_bytes(source.folder / location.relative_path, location.offset, location.length, file)
                    length = file.tell() - start
                    copied = dataclasses.replace(location, relative_path=name, offset=start, length=length)
                    results.append(WriteResult(dataclasses.replace(index, fqn=grown), length, copied))
        hashes[name] = file.hash
    paths = {grown: (grown,) for grown in tensors}  # where a key belongs in a nested state, for torch's own converters
    metadata = dataclasses.replace(source.metadata, state_dict_metadata=tensors, planner_data=paths)
    FileSystemWriter(partial).finish(metadata, [results])
    write_manifest(partial, dumps(grown_state(source)), hashes)


def repeated_rows(source: GrowthSource) -> dict[str, Tensor]:
    """The bias controller's tensors [L, …], which cover all layers, with a row for each new layer."""
    grown = {}
    for key, stored in source.metadata.state_dict_metadata.items():
        if key.startswith(f"{ALL_LAYERS}/") and stored.size:
            ((_, location),) = source.records[key]
            with (source.folder / location.relative_path).open("rb") as file:
                file.seek(location.offset)
                record = io.BytesIO(file.read(location.length))
            grown[key] = torch.load(record, map_location="cpu", weights_only=True)[source.growth.sources]
    return grown


def of_one_box(stored: Any, tensor: Tensor) -> Any:
    """The index entry of a tensor that is stored in one box."""
    chunk = dataclasses.replace(stored.chunks[0], sizes=tensor.shape)
    return dataclasses.replace(stored, size=tensor.shape, chunks=[chunk])


def copy_bytes(path: Path, offset: int, length: int, target: HashedFile) -> None:
    """Append a range of a file to another, a buffer at a time."""
    with path.open("rb") as file:
        file.seek(offset)
        while length:
            data = file.read(min(BUFFER, length))
            if not data:
                raise OSError(errno.EIO, "ends before a record does", str(path))
            target.write(data)
            length -= len(data)


def grown_state(source: GrowthSource) -> dict[str, Any]:
    """state.json of the grown checkpoint: the same counters, a deeper model, and where it comes from."""
    growth, configuration = source.growth, source.state["configuration"]
    model = {**configuration["model"], "num_layers": growth.num_layers * growth.factor}
    origin = {"source": str(source.folder), "step": source.state["counters"]["step"], **dataclasses.asdict(growth)}
    history = [*source.state.get("growth", []), origin]
    changed = {"configuration": {**configuration, "model": model}, "growth": history}
    return {**source.state, **changed, "health": grown_health(source.state.get("health"))}
