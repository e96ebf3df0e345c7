"""Checksums of the state while nothing may change it: from one update to the next, and on its way to a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor

from longcat.faults import Place, passed
from parallel.checksum import combined, digest, resolve
from parallel.state_store import MOMENTS
from train.checkpoint.dcp_tensors import DcpTensor
from train.state import TrainState

Key = tuple[str, tuple[int, ...]]  # kind/name as in a checkpoint, and where the box begins in the full tensor
Checksums = dict[Key, int]


def tensors_at_rest(state: TrainState) -> Iterator[tuple[Key, Tensor]]:
    """All that an update writes on this rank: weights, moments, step counts, copies of weights, biases, controller."""
    for box in state.store.local_boxes():
        yield (box.key, tuple(start for start, _ in box.box)), box.values
    for name, step in state.store.steps():
        yield (f"optimizer_step/{name}", ()), step
    for name, tensor in (*state.store.derived(), *state.replicated()):
        yield (name, ()), tensor


def checksums(tensors: Iterable[tuple[Key, Tensor]]) -> Checksums:
    """The checksum of each tensor."""
    taken = [(key, digest(values)) for key, values in tensors]
    return dict(zip((key for key, _ in taken), resolve(value for _, value in taken), strict=True))


def changed(before: Checksums, now: Checksums) -> list[str]:
    """The names of the tensors whose checksums differ."""
    return [key[0] for key, value in now.items() if before.get(key) != value]


def total(found: Checksums) -> int:
    """One number, of 52 bits, for all of them."""
    return combined(found.values()) >> 12


def changed_in_snapshot(expected: Checksums, tensors: dict[str, Tensor]) -> list[str]:
    """The names among a checkpoint's ``tensors`` whose values are not those of ``expected``.

    The copy of what was on a GPU may be in host memory, where checksums are others.
    """
    boxes = dict(snapshot_boxes(tensors))
    differing = [key for key, value in checksums(boxes.items()).items() if expected.get(key) != value]
    digests = resolve(digest(boxes[key], as_on_gpu=True) for key in differing)
    return [key[0] for key, value in zip(differing, digests, strict=True) if expected.get(key) != value]


def snapshot_boxes(tensors: dict[str, Tensor]) -> Iterator[tuple[Key, Tensor]]:
    """The tensors of a checkpoint as `tensors_at_rest` names them."""
    for name, tensor in tensors.items():
        if isinstance(tensor, DcpTensor):
            yield from (((name, tuple(offset)), values) for offset, (_, values) in tensor.boxes.items())
        else:
            yield (name, ()), tensor


def strike(state: TrainState) -> None:
    """Let injected faults change weights and moments."""
    for box in state.store.local_boxes(write=True):
        passed(Place.moment if box.kind in MOMENTS else Place.weight, box.key, box.values)


def strike_update(state: TrainState) -> None:
    """Let injected faults change what AdamW has just written."""
    for box in state.store.local_boxes(write=True):
        passed(Place.optimizer, box.key, box.values)
