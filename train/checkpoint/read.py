"""A checkpoint read without ranks: its configuration, and any box of any stored tensor, one at a time."""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from longcat.model import LongCat
from longcat.names import Box, stored_state
from train.checkpoint.find import STATE, CheckpointStatus, list_checkpoints, verify
from train.checkpoint.shards import ShardReader


class TensorSource(Protocol):
    """Where a model's stored tensors come from, box by box, so that no more than a few need be in memory."""

    def boxes(self, stored_name: str, shape: tuple[int, ...]) -> list[Box]:
        """Boxes that cover a stored tensor of this shape, in order, each cheap to read by itself."""

    def read(self, stored_name: str, shape: tuple[int, ...], box: Box) -> Tensor:
        """The values in ``box``, float32."""


class Checkpoint:
    """A whole checkpoint of ours: a `TensorSource` of its weights and biases. Newer ones that are damaged are told of.

    Raises:
        ConfigError: the folder is none, or its hashes do not hold.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, passed_over = find_valid(folder)
        report_skipped(passed_over, self.folder)
        try:
            stored = json.loads((self.folder / STATE).read_text())
            self.reader = ShardReader(self.folder)
            self.metadata = self.reader.read_metadata()
        except OSError as error:
            raise gone(self.folder, error) from error
        self.configuration: dict[str, Any] = stored["configuration"]
        self.counters: dict[str, int] = stored["counters"]
        try:
            self.model = ModelConfig(**self.configuration["model"])
        except TypeError as error:
            raise ConfigError(f"{self.folder} is of another version of this program ({error}); use that one") from error

    def boxes(self, stored_name: str, shape: tuple[int, ...]) -> list[Box]:
        """The whole tensor, or stacks of experts as the shards cut them: a shard is read as one, and once."""
        if not stored_name.rpartition(".")[0].endswith(".experts"):
            return [full_box(shape)]
        chunks = self._stored(stored_name).chunks
        cuts = sorted({0, shape[0], *(chunk.offsets[0] for chunk in chunks)})
        return [((start, stop), *full_box(shape[1:])) for start, stop in itertools.pairwise(cuts) if stop > start]

    def read(self, stored_name: str, shape: tuple[int, ...], box: Box) -> Tensor:
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

        from train.checkpoint.dcp_tensors import DcpTensor

        stored = tuple(self._stored(stored_name).size)
        if stored != tuple(shape):
            raise ConfigError(
                f"{self.folder}: {stored_name} is {list(stored)} there and {list(shape)} by its configuration; "
                f"take another checkpoint"
            )
        values = torch.zeros([stop - start for start, stop in box])
        wanted: dict[str, Any] = {key_of(stored_name): DcpTensor(tuple(shape), [(box, values)], torch.float32)}
        planner = DefaultLoadPlanner()
        planner.set_up_planner(wanted, self.metadata, is_coordinator=True)
        self.reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        plan = self.reader.prepare_local_plan(planner.create_local_plan())
        if sum(math.prod(item.lengths) for item in plan.items) != values.numel():
            raise ConfigError(f"{self.folder} holds only parts of {stored_name}; take another checkpoint")
        try:
            self.reader.read_data(plan, planner).wait()
        except OSError as error:
            raise gone(self.folder, error) from error
        return values

    def _stored(self, stored_name: str) -> Any:
        found = self.metadata.state_dict_metadata.get(key_of(stored_name))
        if found is None:
            raise ConfigError(f"{self.folder} has no {key_of(stored_name)}; take another checkpoint")
        return found


def gone(folder: Path, error: OSError) -> ConfigError:
    """For a checkpoint that was whole a moment ago."""
    return ConfigError(
        f"{folder} can no longer be read ({error}); does a run that still goes remove its old checkpoints? Take a "
        f"newer one"
    )


def key_of(stored_name: str) -> str:
    """Under which key a checkpoint stores a weight or a router's bias."""
    return f"{'bias' if stored_name.endswith('e_score_correction_bias') else 'weight'}/{stored_name}"


def full_box(shape: tuple[int, ...]) -> Box:
    return tuple((0, size) for size in shape)


def find_valid(folder: Path) -> tuple[Path, list[CheckpointStatus]]:
    """``folder`` itself, or the newest whole checkpoint of a run's folder; and the newer ones that are not whole.

    Raises:
        ConfigError: there is none, or its hashes do not hold.
    """
    if not folder.is_dir():
        raise ConfigError(f"source={folder} is no folder; give a checkpoint's or a run's")
    inside = folder / "checkpoints" if (folder / "checkpoints").is_dir() else folder
    candidates = list_checkpoints(inside)[::-1] or [inside]
    statuses = []
    for candidate in candidates:
        statuses.append(verify(candidate))
        if statuses[-1].problem is None:
            return candidate, statuses[:-1]
    problems = "; ".join(f"{status.folder.name}: {status.problem}" for status in statuses)
    raise ConfigError(f"source={folder} holds no whole checkpoint ({problems}); restore its files or name another")


def report_skipped(passed_over: list[CheckpointStatus], taken: Path) -> None:
    """On standard error: text and paths that are asked for go to standard output."""
    for status in passed_over:
        print(f"passed over {status.folder}: {status.problem}", file=sys.stderr)
    if passed_over:
        print(f"taken instead: {taken}", file=sys.stderr)


def stored_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(stored name, shape) of all that a model of these sizes is made of; nothing is allocated."""
    with torch.device("meta"):
        model = LongCat(config)
    for name, tensor in stored_state(model):
        yield name, tuple(tensor.shape)


@torch.no_grad()
def load_model(config: ModelConfig, source: TensorSource, dtype: torch.dtype, device: torch.device) -> LongCat:
    """A model with a source's values in ``dtype``; routers and biases stay float32."""
    with torch.device("meta"):
        model = LongCat(config).to(dtype)
        for router in model.routers():
            router.float()
    model.to_empty(device=device)
    for name, tensor in stored_state(model):
        for box in source.boxes(name, tuple(tensor.shape)):
            values = source.read(name, tuple(tensor.shape), box)
            tensor[tuple(slice(start, stop) for start, stop in box)].copy_(values)
    return model.requires_grad_(False).eval()
