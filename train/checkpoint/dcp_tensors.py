"""A stored tensor as torch.distributed.checkpoint sees it: its full shape, and its boxes on this rank.

Every sharding engine's state has this form, so checkpoints are resharded on load.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, StorageReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from longcat.names import Box
from parallel.state_store import LocalBox
from parallel.torch_internals import make_wrapper_subclass
from train.state import TrainState

STEP = "optimizer_step/"  # begins the keys of AdamW's step counts, which all ranks of a pipeline stage have


class DcpTensor(Tensor):
    """A wrapper of the full shape, without memory, over the boxes of it that this rank stores."""

    boxes: dict[torch.Size, tuple[torch.Size, Tensor]]  # offset → (size, values)

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], parts: Iterable[tuple[Box, Tensor]], dtype: torch.dtype) -> DcpTensor:
        made = make_wrapper_subclass(cls, shape, dtype)
        made.boxes = {
            torch.Size(start for start, _ in box): (torch.Size(stop - start for start, stop in box), values)
            for box, values in parts
            if values.numel()
        }
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{function} on a sharded tensor; use its boxes")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets=offset, sizes=size) for offset, (size, _) in self.boxes.items()]

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.boxes[index.offset][1]


def by_key(local_boxes: Iterable[LocalBox]) -> dict[str, Tensor]:
    """Key of each stored tensor → its boxes on this rank."""
    grouped: dict[str, list[LocalBox]] = {}
    for one in local_boxes:
        grouped.setdefault(one.key, []).append(one)
    return {
        key: DcpTensor(boxes[0].shape, [(one.box, one.values) for one in boxes], boxes[0].values.dtype)
        for key, boxes in grouped.items()
    }


Take = Callable[[Tensor], Tensor]  # a tensor → what is written for it: itself or a copy


def saved(state: TrainState, take: Take | None = None) -> dict[str, Tensor]:
    """The full state as a checkpoint stores it, each tensor as ``take`` returns it."""
    if take is None:
        take = clone if state.store.transient else identity
    steps = {STEP + name: take(step) for name, step in state.store.steps()}
    replicated = {name: take(tensor) for name, tensor in state.replicated()}
    return by_key(replace_values(state.store.local_boxes(), take)) | steps | replicated


def identity(tensor: Tensor) -> Tensor:
    return tensor


def clone(tensor: Tensor) -> Tensor:
    return tensor.clone()


def replace_values(local_boxes: Iterable[LocalBox], take: Take) -> Iterator[LocalBox]:
    """The same boxes with other values."""
    for one in local_boxes:
        yield LocalBox(one.kind, one.name, one.shape, one.box, take(one.values))


def box_values(tensors: dict[str, Tensor]) -> Iterator[Tensor]:
    """This rank's boxes of the sharded ones among ``tensors``."""
    for tensor in tensors.values():
        if isinstance(tensor, DcpTensor):
            yield from (values for _, values in tensor.boxes.values())


def values_here(tensors: dict[str, Tensor]) -> Iterator[Tensor]:
    """All values among ``tensors`` on this rank: its boxes, and what every rank has in full."""
    yield from box_values(tensors)
    yield from (tensor for tensor in tensors.values() if not isinstance(tensor, DcpTensor) and tensor.numel())


def loaded(state: TrainState) -> tuple[dict[str, Tensor], list[LocalBox]]:
    """Tensors to load a checkpoint into, and the boxes among them; call `finish_load` afterwards."""
    boxes = list(replace_values(state.store.local_boxes(write=True), clone if state.store.transient else identity))
    steps = {STEP + name: step for name, step in state.store.steps(write=True)}
    return by_key(boxes) | steps | dict(state.replicated()), boxes


def read_values(tensors: dict[str, Tensor], reader: StorageReader, metadata: Metadata) -> None:
    """Fill ``tensors``, by key, with a checkpoint's values: of sharded ones this rank's boxes.

    Raises:
        RuntimeError: a tensor is not in the checkpoint.
        ValueError: it has another shape there, or only a part of a box is there.
        OSError: a file is missing, cannot be read or is too short.
    """
    planner = DefaultLoadPlanner()
    planner.set_up_planner({**tensors}, metadata, is_coordinator=True)
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    plan = reader.prepare_local_plan(planner.create_local_plan())
    found: Counter[str] = Counter()
    for item in plan.items:
        found[item.dest_index.fqn] += math.prod(item.lengths)
    for key, tensor in tensors.items():
        if found[key] != sum(values.numel() for values in values_here({key: tensor})):
            raise ValueError(f"it contains only parts of {key}")
    reader.read_data(plan, planner).wait()


@torch.no_grad()
def finish_load(state: TrainState, boxes: list[LocalBox]) -> None:
    """Copy loaded boxes into the store where they are copies, and refresh what depends on them. A collective."""
    if state.store.transient:
        for target, read in zip(state.store.local_boxes(write=True), boxes, strict=True):
            target.values.copy_(read.values)
    state.store.refresh()
    state.set_biases(state.biases)
    state.checksums = None
