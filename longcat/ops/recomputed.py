"""Values that the backward computes again instead of keeping them.

Where the model makes such a value, it says how and from what: `recomputable`. Within `recomputing`, autograd keeps this
recipe in place of each such value that it would save. The first use in the backward computes the value again, by the
same operators from the same inputs, so with the same bits; it stays until its last use.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from longcat.ops.torch_internals import storage_key
from longcat.recompute_values import Value


class _Recipe:
    """How to compute a value, or several at once."""

    def __init__(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> None:
        self.function, self.inputs = function, inputs  # inputs as `_pack` makes them, from the first `add_user` on
        self.users = 0  # saved tensors that the backward has not asked for yet
        self.values: list[Tensor] = []  # while others will use them
        self.stream: Any = None  # on which they were computed

    def add_user(self) -> None:
        if not self.users:
            self.inputs = tuple(_pack(one) if isinstance(one, Tensor) else one for one in self.inputs)
        self.users += 1

    def compute(self) -> list[Tensor]:
        """The outputs: those at hand if they were made on this stream, else new ones."""
        stream = current_stream()
        if not self.values or stream != self.stream:
            with torch.no_grad():
                self.values = _listed(self.function(*(_unpack(one) for one in self.inputs)))
            self.stream = stream
        found, self.users = self.values, self.users - 1
        if self.users <= 0:
            self.values = []
        return found


class _Recomputed(NamedTuple):
    """Stands for a saved tensor: a view of one output of a recipe."""

    recipe: _Recipe
    output: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Output(NamedTuple):
    """A storage that a recipe can fill again; as long as something else keeps it."""

    storage: weakref.ref[torch.UntypedStorage]
    recipe: _Recipe
    number: int
    dtype: torch.dtype


_chosen: frozenset[Value] = frozenset()
_outputs: dict[int, _Output] = {}  # by the key of the storage


def recomputable(value: Value, function: Callable[..., Any], *inputs: Any) -> Any:
    """``function(*inputs)``, one tensor or a tuple, which the backward computes again if ``value`` is chosen.

    The function must give the same bits each time, change nothing, and read no tensors but ``inputs`` and weights.
    """
    return recompute_by(value, function(*inputs), function, *inputs)


def recompute_by(value: Value, out: Any, function: Callable[..., Any], *inputs: Any) -> Any:
    """``out``, which was computed in another way that has the bits of ``function(*inputs)``; see `recomputable`."""
    if value not in _chosen:
        return out
    recipe = _Recipe(function, inputs)
    kept = {storage_key(one.untyped_storage()) for one in inputs if isinstance(one, Tensor)}
    for number, output in enumerate(_listed(out)):
        storage = output.untyped_storage()
        key = storage_key(storage)
        if key not in kept:  # no view of an input
            forget = partial(_forget, key, recipe)
            _outputs[key] = _Output(weakref.ref(storage, forget), recipe, number, output.dtype)
    return out


def _forget(key: int, recipe: _Recipe, _: Any) -> None:
    found = _outputs.get(key)
    if found is not None and found.recipe is recipe:
        del _outputs[key]


@contextmanager
def recomputing(values: Collection[Value]) -> Iterator[None]:
    """Let autograd keep recipes of the chosen ``values`` that are made meanwhile."""
    global _chosen
    before, _chosen = _chosen, frozenset(values)
    try:
        with saved_tensors_hooks(_pack, _unpack):
            yield
    finally:
        _chosen = before
        _outputs.clear()


def _pack(tensor: Tensor) -> Tensor | _Recomputed:
    if tensor.layout is not torch.strided:
        return tensor.detach()
    storage = tensor.untyped_storage()
    found = _outputs.get(storage_key(storage))
    if found is None or found.storage() is not storage or found.dtype != tensor.dtype:
        # Not a result itself: with its node, which keeps this, it would be a cycle that nothing frees. Weights stay
        # themselves: ZeRO-3 gives them other data meanwhile
        return tensor if tensor.is_leaf else tensor.detach()
    found.recipe.add_user()
    return _Recomputed(found.recipe, found.number, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _unpack(packed: Any) -> Any:
    if not isinstance(packed, _Recomputed):
        return packed
    output = packed.recipe.compute()[packed.output]
    return output.as_strided(packed.size, packed.stride, packed.offset)


def current_stream() -> Any:
    """The stream on which work is queued; None on a CPU."""
    return torch.cuda.current_stream() if torch.cuda.is_initialized() else None


def _listed(out: Any) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else list(out)
