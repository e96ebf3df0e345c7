"""The hook of fault injection: what an operator call or a transfer returns passes through `passed`.

    out = passed(Place.activation, "linear", product(x, weight))     # in an operator's forward
    return passed_all(Place.gradient, "linear", grads)               # in its backward

Nothing happens unless an injector is installed (`parallel/sdc/inject.py`, key `sdc.inject`): the cost is one comparison
with None. An injector changes the tensor's values in place, without telling autograd, as a defective unit would. Code
that runs an operator a second time, to compare, calls the same forward or backward, so its outputs pass the hook again:
a fault that is injected for good strikes the same positions of the second result, a transient one does not. `product`
and `elementwise` are inside operators: there results pass as they are written, permuted in a permuted second run.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the configuration is read without torch
    from torch import Tensor


class Place(StrEnum):
    """Where a fault strikes."""

    weight = "weight"  # a master weight at rest, between two updates
    moment = "moment"  # a moment of AdamW at rest
    activation = "activation"  # the output of an operator's forward
    gradient = "gradient"  # an output of an operator's backward, other than attention's
    attention_backward = "attention_backward"  # an output of attention's backward
    product = "product"  # the result of a matrix product, as the unit wrote it
    elementwise = "elementwise"  # likewise of a chain of elementwise operations and row sums
    payload = "payload"  # what a rank received from another one
    gathered_weight = "gathered_weight"  # a weight gathered for a layer's computation
    optimizer = "optimizer"  # a weight or a moment as AdamW wrote it
    snapshot = "snapshot"  # a tensor on its way to a checkpoint
    file = "file"  # a checkpoint's file, after it was written


Hook = Callable[[Place, str, "Tensor"], None]  # place, name of the operator or tensor, tensor to change in place
_hooks: list[Hook] = []  # at most one


def install_hook(hook: Hook | None) -> None:
    """Let ``hook`` see what passes from now on; None ends that."""
    _hooks[:] = [] if hook is None else [hook]


def is_active() -> bool:
    """Whether an injector is installed."""
    return bool(_hooks)


def passed(place: Place, name: str, tensor: Tensor) -> Tensor:
    """The tensor, with a fault in it if one is due here."""
    if _hooks:
        _hooks[0](place, name, tensor)
    return tensor


def passed_all(place: Place, name: str, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tensors (or None) that have passed in order."""
    if _hooks:
        for tensor in tensors:
            if tensor is not None and tensor.numel():
                _hooks[0](place, name, tensor)
    return tensors
