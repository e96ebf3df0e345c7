"""Growth of a checkpoint in depth: its bytes are copied under new names, and no layer is ever in memory.

A checkpoint's shards are rows of records, one for each box of a stored tensor, and an index says where each lies. The
grown checkpoint has the records of an old layer as often as the layer is repeated: weights, moments and biases are the
old ones bit for bit, in whatever boxes the old run's layout had cut them, and any layout loads them. Only what the
bias controller keeps in one tensor for all layers is read, and repeated row by row.
"""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from longcat.errors import ConfigError
from longcat.growth import Growth, layer_of
from train.checkpoint.find import (
    PARTIAL,
    STATE,
    check_name,
    find_named,
    is_inside,
    list_checkpoints,
    new_hash,
    step_of,
    verify,
)
from train.checkpoint.read import report_skipped
from train.checkpoint.retention import lock_folder
from train.checkpoint.save import commit

BUFFER = 1 << 20  # bytes that are copied at a time
SPARE = 16 << 20  # bytes that must stay free beside the grown checkpoint: its index, its state
# Kinds of state: those whose tensors belong to one layer or to none, and that with one tensor [L, …] for all layers
OF_ONE_LAYER, OF_ALL_LAYERS = ("weight", "exp_avg", "exp_avg_sq", "optimizer_step", "bias"), "controller"


@dataclass
class GrowthOptions:
    """How often and in which order layers are repeated."""

    factor: int = 2  # how often each layer is repeated; at least 2
    # stack = the whole stack again, layers 0 1 0 1 (the report's way); interpose = each layer again in place, 0 0 1 1
    method: str = "stack"


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
    """A whole checkpoint, and how it grows."""

    folder: Path
    state: dict[str, Any]  # of state.json
    metadata: Any  # torch's index of the shards
    records: dict[str, list[tuple[Any, Any]]]  # key → (its box, where that lies) of each record
    growth: Growth


def grow(config: GrowConfig) -> tuple[Path, Growth]:
    """Write the grown checkpoint of ``config.source`` to ``config.target``.

    Returns the source that was taken and how it grew.

    Raises:
        ConfigError: the source is no whole checkpoint of a known kind, the target is there, or the disk is too small.
    """
    config.validate()
    target = Path(config.target)
    check_target(target)
    taken = find_named(Path(config.source), key="source")
    if (Path(config.source) / "checkpoints").is_dir():  # a run: what is newer than the one taken is damaged
        newer = [verify(path) for path in list_checkpoints(taken.parent) if path.name > taken.name]
        report_skipped([status for status in newer if status.problem], taken)
    source = read_source(taken, config.growth)
    check_name(target, source.state["counters"]["step"])
    check_place(target, source)
    partial = target.with_name(f"{target.name}{PARTIAL}")
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(f"{partial} is there: another growth writes it, or one has died and it can go") from None
    except OSError as error:
        raise ConfigError(f"target={target}: cannot write there ({error.strerror}); choose another") from error
    try:
        with lock_folder(partial):
            check_disk_space(partial, source)
            write(source, partial, target)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise ConfigError(
                f"growth of {source.folder} failed: {error.strerror or error} ({error.filename or target}); nothing is "
                f"left of it; is the disk full, or does a run that still goes remove its old checkpoints?"
            ) from error
        raise
    return source.folder, source.growth


def check_target(target: Path) -> None:
    if os.path.lexists(target):
        raise ConfigError(f"target={target} is there already and is not overwritten; choose another or remove it")


def check_place(target: Path, source: GrowthSource) -> None:
    """Refuse a place where the shallow run would take the grown checkpoint for one of its own."""
    if step_of(target) >= 0 and target.resolve().parent == source.folder.resolve().parent:
        raise ConfigError(f"target={target} would be one of the shallow run's own checkpoints; choose another folder")
    if is_inside(target, source.folder):
        raise ConfigError(f"target={target} lies inside the checkpoint that grows; choose another folder")


def check_disk_space(folder: Path, source: GrowthSource) -> None:
    needed = sum(
        place.length * len(grown_keys(source.growth, key))
        for key, records in source.records.items()
        for _, place in records
    )
    free = shutil.disk_usage(folder).free
    if needed + SPARE > free:
        raise ConfigError(
            f"the grown checkpoint takes {needed / 2**30:.2f} GiB and {folder.parent} has {free / 2**30:.2f} GiB free; "
            f"choose another target"
        )


def read_source(folder: Path, options: GrowthOptions) -> GrowthSource:
    """The state and the index of a whole checkpoint; none of its tensors."""
    from torch.distributed.checkpoint import FileSystemReader

    try:
        state = json.loads((folder / STATE).read_text())
        num_layers = int(state["configuration"]["model"]["num_layers"])
        int(state["counters"]["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"source={folder}: {STATE} does not say the model and the step; name another") from error
    metadata = FileSystemReader(folder).read_metadata()
    check_known_state(metadata.state_dict_metadata, num_layers, folder)
    records = defaultdict(list)
    for index, place in metadata.storage_data.items():
        records[index.fqn].append((index, place))
    return GrowthSource(folder, state, metadata, dict(records), Growth(num_layers, options.factor, options.method))


def check_known_state(tensors: dict[str, Any], num_layers: int, folder: Path) -> None:
    """Refuse what would be repeated wrongly: a kind of state that this file does not know, layers that lack."""
    layers = set()
    for key, stored in tensors.items():
        kind, _, name = key.partition("/")
        if kind in OF_ONE_LAYER:
            layers.add(layer_of(name))
        elif kind != OF_ALL_LAYERS or not one_box_by_layer(stored, num_layers):
            raise ConfigError(f"source={folder} holds {key}, which growth cannot place; it was written by other code")
    if layers - {None} != set(range(num_layers)):
        raise ConfigError(f"source={folder} does not hold the {num_layers} layers that its {STATE} says; name another")


def one_box_by_layer(stored: Any, num_layers: int) -> bool:
    """Whether a tensor is stored whole and has a row for each layer, or is one number."""
    return len(stored.chunks) == 1 and (not stored.size or stored.size[0] == num_layers)


def grown_keys(growth: Growth, key: str) -> list[str]:
    """`kind/stored name` → its keys in the grown checkpoint."""
    kind, _, name = key.partition("/")
    return [f"{kind}/{grown}" for grown in growth.grown_names(name)] if kind in OF_ONE_LAYER else [key]


def blocks(source: GrowthSource) -> list[list[tuple[str, str]]]:
    """(old key, grown key) of all that is outside the stack, then of each new layer."""
    found = defaultdict(list)
    for key in sorted(source.records):
        for grown in grown_keys(source.growth, key):
            layer = layer_of(grown.partition("/")[2])
            found[-1 if layer is None else layer].append((key, grown))
    return [found[layer] for layer in sorted(found)]


def write(source: GrowthSource, partial: Path, target: Path) -> None:
    """Write shards (a file for each block), index, state and manifest into ``partial``; rename it to ``target``."""
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
                for index, place in source.records[key]:
                    start = file.position
                    if key in repeated:
                        record = io.BytesIO()
                        torch.save(repeated[key], record)
                        file.write(record.getvalue())
                    else:
                        copy_bytes(source.folder / place.relative_path, place.offset, place.length, file)
                    length = file.position - start
                    lies = dataclasses.replace(place, relative_path=name, offset=start, length=length)
                    results.append(WriteResult(dataclasses.replace(index, fqn=grown), length, lies))
        hashes[name] = file.hash
    paths = {grown: (grown,) for grown in tensors}  # torch's own converters ask where in a nested state a key belongs
    metadata = dataclasses.replace(source.metadata, state_dict_metadata=tensors, planner_data=paths)
    FileSystemWriter(partial).finish(metadata, [results])
    commit(partial, target, json.dumps(grown_state(source)), hashes)


def repeated_rows(source: GrowthSource) -> dict[str, Tensor]:
    """What the bias controller keeps as one tensor [L, …] for all layers, with a row for each new layer."""
    grown = {}
    for key, stored in source.metadata.state_dict_metadata.items():
        if key.startswith(f"{OF_ALL_LAYERS}/") and stored.size:
            ((_, place),) = source.records[key]
            with (source.folder / place.relative_path).open("rb") as file:
                file.seek(place.offset)
                record = io.BytesIO(file.read(place.length))
            grown[key] = torch.load(record, map_location="cpu", weights_only=True)[source.growth.sources]
    return grown


def of_one_box(stored: Any, tensor: Tensor) -> Any:
    """The index's entry of a tensor that is stored whole."""
    whole = dataclasses.replace(stored.chunks[0], sizes=tensor.shape)
    return dataclasses.replace(stored, size=tensor.shape, chunks=[whole])


def copy_bytes(path: Path, offset: int, length: int, target: HashedFile) -> None:
    """Append a stretch of a file to another, a buffer at a time."""
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
    came = {"source": str(source.folder), "step": source.state["counters"]["step"], **dataclasses.asdict(growth)}
    history = [*source.state.get("growth", []), came]
    return {**source.state, "configuration": {**configuration, "model": model}, "growth": history}


class HashedFile:
    """A new file that knows how much has been written and the hash of it; on disk when it is left."""

    def __init__(self, path: Path) -> None:
        self.path, self.position, self._digest = path, 0, new_hash()

    @property
    def hash(self) -> str:
        return self._digest.hexdigest()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.position += len(data)

    def __enter__(self) -> HashedFile:
        self._file: IO[bytes] = self.path.open("xb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
