"""A stored tensor as torch.distributed.checkpoint sees it: its whole shape, and the boxes of it that are on this rank.

Every sharding engine's state has this form, so a checkpoint of one loads into another.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from longcat.names import Box
from parallel.store import Held, Store
from train.state import TrainState


class SpreadTensor(Tensor):
    """A tensor without memory of its own over boxes that have some."""

    boxes: dict[torch.Size, tuple[torch.Size, Tensor]]  # offset → (size, values)

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], parts: Iterable[tuple[Box, Tensor]], dtype: torch.dtype) -> SpreadTensor:
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype)  # type: ignore[attr-defined]
        made.boxes = {
            torch.Size(start for start, _ in box): (torch.Size(stop - start for start, stop in box), values)
            for box, values in parts
            if values.numel()
        }
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{function} on a tensor that is spread over ranks; use its boxes")

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


def spread(held: Iterable[Held]) -> dict[str, Tensor]:
    """Boxes by the key of their tensor."""
    by_key: dict[str, list[Held]] = {}
    for one in held:
        by_key.setdefault(one.key, []).append(one)
    return {
        key: SpreadTensor(boxes[0].shape, [(one.box, one.values) for one in boxes], boxes[0].values.dtype)
        for key, boxes in by_key.items()
    }


def saved(state: TrainState) -> dict[str, Tensor]:
    """Everything of a state, as a checkpoint stores it."""
    steps = {f"optimizer_step/{name}": step for name, step in state.store.steps()}
    return spread(kept(state.store)) | steps | dict(state.replicated())


def kept(store: Store, write: bool = False) -> Iterator[Held]:
    """What `held` gives, in memory for as long as one likes."""
    for one in store.held(write):
        yield Held(one.kind, one.name, one.shape, one.box, one.values.clone()) if store.transient else one


def loaded(state: TrainState) -> tuple[dict[str, Tensor], list[Held]]:
    """Tensors for a checkpoint to be loaded into, and the boxes among them; `finish_load` puts all in place."""
    boxes = list(kept(state.store, write=True))
    steps = {f"optimizer_step/{name}": step for name, step in state.store.steps(write=True)}
    return spread(boxes) | steps | dict(state.replicated()), boxes


@torch.no_grad()
def finish_load(state: TrainState, boxes: list[Held]) -> None:
    """Make a loaded state what is trained. A collective."""
    if state.store.transient:
        for mine, read in zip(state.store.held(write=True), boxes, strict=True):
            mine.values.copy_(read.values)
    state.store.refresh()
    state.set_biases(state.biases)
