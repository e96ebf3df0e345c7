"""Logical names: how stored tensors (stacked experts, shards) map to the names and boxes that every layout shares.

A logical tensor is one matrix under its Hugging Face name, for instance
``model.layers.3.mlp.experts.7.gate_proj.weight``. The experts of a layer are stored stacked: `gate_up` [E, 2F, D] holds
`gate_proj` and `up_proj` of E experts, `down` [E, D, F] their `down_proj`. `pieces` maps a box of a stored tensor to
boxes of logical tensors; initial values, hashes and exports all use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

Box = tuple[tuple[int, int], ...]  # (start, stop) in each dimension


@dataclass(frozen=True)
class Piece:
    """A logical tensor's part of a stored box.

    ``index`` selects the part in the local stored tensor; ``box`` is its position in the logical tensor of shape
    ``shape``.
    """

    name: str
    shape: tuple[int, ...]
    index: tuple[slice | int, ...]
    box: Box


def stored_to_logical(stored_name: str) -> str:
    """The logical name of a parameter or buffer that is stored unstacked."""
    return stored_name if stored_name.startswith("lm_head.") else f"model.{stored_name}"


def pieces(stored_name: str, shape: tuple[int, ...], box: Box | None = None) -> Iterator[Piece]:
    """Yield the logical parts of the stored tensor ``stored_name`` (global ``shape``) inside ``box``.

    ``box`` is the part that this rank stores, in global coordinates; None means all of it.
    """
    box = box or tuple((0, size) for size in shape)
    stack, _, leaf = stored_name.rpartition(".")
    if not stack.endswith(".experts"):
        if all(start < stop for start, stop in box):
            index = tuple(slice(0, stop - start) for start, stop in box)
            yield Piece(stored_to_logical(stored_name), tuple(shape), index, box)
        return
    rows = shape[1] // 2 if leaf == "gate_up" else shape[1]
    matrices = ("gate_proj", "up_proj") if leaf == "gate_up" else ("down_proj",)
    (first, last), (row_start, row_stop), columns = box
    for expert in range(first, last):
        for number, matrix in enumerate(matrices):
            start = max(row_start, number * rows)
            stop = min(row_stop, (number + 1) * rows)
            if start >= stop or columns[0] >= columns[1]:
                continue
            yield Piece(
                name=f"model.{stack}.{expert}.{matrix}.weight",
                shape=(rows, shape[2]),
                index=(expert - first, slice(start - row_start, stop - row_start), slice(None)),
                box=((start - number * rows, stop - number * rows), columns),
            )


def stored_state(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers under their stored names, in a fixed order."""
    yield from model.named_parameters()
    persistent = model.state_dict().keys()
    for name, buffer in model.named_buffers():
        if name in persistent:
            yield name, buffer


def logical_tensors(model: nn.Module, grads: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Yield (logical name, view) of every parameter and buffer of an unsharded model; views share storage.

    With ``grads``, views of the gradients; tensors without one (buffers, unused parameters) are left out.
    """
    for stored_name, tensor in stored_state(model):
        stored = tensor.grad if grads else tensor.detach()
        if stored is None:
            continue
        for piece in pieces(stored_name, tuple(tensor.shape)):
            yield piece.name, stored[piece.index]


# Parts of the model beside its layers, by which gradient norms are reported; the final norm is part of the head
OTHER_PARTS = ("embedding", "head", "mtp")


def part_number(stored_name: str, num_layers: int) -> int:
    """The number of the parameter's part of the model: its layer's, and ``num_layers`` + i for `OTHER_PARTS[i]`."""
    first, _, rest = stored_name.partition(".")
    if first == "layers":
        return int(rest.partition(".")[0])
    part = {"embed_tokens": "embedding", "mtp": "mtp"}.get(first, "head")
    return num_layers + OTHER_PARTS.index(part)
