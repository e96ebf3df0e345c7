"""Which part of a checkpoint each rank writes, and torch's index of all parts, `.metadata`.

`torch.distributed.checkpoint.save` lets the first rank plan: it receives the list of every rank's boxes, removes those
that several ranks have, sends every rank its list back and, after writing, sends the index of the whole checkpoint to
all of them. With thousands of ranks these are millions of Python objects on each. Here a rank knows from the layout
alone what it writes, and only the first rank receives the index, in plain lists.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from longcat.garbage import no_collections
from parallel.mesh import Axis, Topology
from parallel.torch_internals import record_place
from train.checkpoint.dcp_tensors import STEP, DcpTensor
from train.checkpoint.files import HashedFile
from train.checkpoint.shards import METADATA


@dataclass(frozen=True)
class Placement:
    """A rank among those that have the same tensors."""

    replica: int  # of `replicas` whose ranks have the same boxes
    replicas: int
    first_of_stage: bool
    first: bool  # of all ranks

    @classmethod
    def of(cls, topology: Topology, has_replicas: bool) -> Placement:
        replica, replicas = (topology.coordinate(Axis.DP), topology.sizes.dp) if has_replicas else (0, 1)
        return cls(replica, replicas, topology.holds_first_shards, topology.is_first)


def items_to_write(tensors: dict[str, Tensor], here: Placement) -> list[WriteItem]:
    """What this rank writes of ``tensors``, which `dcp_tensors.saved` lists: each element is written by one rank.

    Ranks with the same boxes share them, each time the one with the fewest bytes so far takes the next.
    """
    items, taken = [], [0] * here.replicas
    for key, tensor in tensors.items():
        if isinstance(tensor, DcpTensor):
            for item in tensor.__create_write_items__(key, None):
                replica = taken.index(min(taken))
                taken[replica] += num_bytes(item)
                if replica == here.replica:
                    items.append(item)
        elif here.first_of_stage if key.startswith(STEP) else here.first:
            chunk = ChunkStorageMetadata(offsets=torch.Size([0] * tensor.dim()), sizes=tensor.size())
            data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), tensor.size())
            items.append(WriteItem(MetadataIndex(key, chunk.offsets), WriteItemType.TENSOR, tensor_data=data))
    return items


def num_bytes(item: WriteItem) -> int:
    data = item.tensor_data
    assert data is not None
    return math.prod(data.chunk.sizes) * data.properties.dtype.itemsize


Written = tuple[tuple[int, ...], tuple[int, ...], str, int, int]  # offset, size; its file, position and bytes there
Entries = dict[str, tuple[torch.dtype, tuple[int, ...], list[Written]]]  # key → dtype, full shape, boxes


def entries(tensors: dict[str, Tensor], items: Iterable[WriteItem], results: Iterable[WriteResult]) -> Entries:
    """This rank's part of the index, with the sharded ``tensors`` of which it writes nothing: another one has to."""
    places = {result.index: result.storage_data for result in results}
    found: Entries = {
        key: (one.dtype, tuple(one.shape), []) for key, one in tensors.items() if isinstance(one, DcpTensor)
    }
    for item in items:
        data, place = item.tensor_data, places[item.index]
        assert data is not None
        boxes = found.setdefault(item.index.fqn, (data.properties.dtype, tuple(data.size), []))[2]
        offset, size = tuple(data.chunk.offsets), tuple(data.chunk.sizes)
        boxes.append((offset, size, place.relative_path, place.offset, place.length))
    return found


def gather(own: Entries, group: dist.ProcessGroup | None) -> list[Entries] | None:
    """Every rank's part, on the first rank; None on the others. A collective."""
    found: list[Entries] | None = [{}] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, found, group=group)
    return found


@no_collections()  # of millions of objects, none of which is garbage
def write_index(parts: Sequence[Entries], folder: Path) -> None:
    """Write `.metadata`.

    Raises:
        ValueError: the boxes of a tensor are not the whole tensor.
        OSError: it cannot be written.
    """
    from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION

    tensors: dict[str, TensorStorageMetadata] = {}
    places = {}
    for part in parts:
        for key, (dtype, shape, boxes) in part.items():
            size = torch.Size(shape)
            stored = tensors.setdefault(key, TensorStorageMetadata(TensorProperties(dtype=dtype), size, []))
            for offset, extent, name, position, length in boxes:
                chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(extent))
                places[MetadataIndex(key, chunk.offsets, len(stored.chunks))] = record_place(name, position, length)
                stored.chunks.append(chunk)
    for key, stored in tensors.items():
        check_complete(key, stored)
    keys = {key: (key,) for key in tensors}  # by which torch's own tools rebuild a dictionary
    index = Metadata({**tensors}, planner_data=keys, storage_data=places, version=CURRENT_DCP_VERSION)
    with HashedFile(folder / METADATA, "wb") as file:
        pickle.dump(index, file)


def check_complete(key: str, stored: TensorStorageMetadata) -> None:
    starts, whole = {chunk.offsets for chunk in stored.chunks}, math.prod(stored.size)
    found = sum(math.prod(chunk.sizes) for chunk in stored.chunks)
    if len(starts) != len(stored.chunks) or found != whole:
        raise ValueError(f"{key}: {len(stored.chunks)} boxes of {found} values in all were written for {whole}")
