"""Activation recomputation: what the backward computes again instead of keeping it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longcat.layer import MTPLayer, ShortcutLayer
from longcat.model import LongCat
from longcat.ops.recomputed import recomputing
from longcat.recompute_values import Value
from parallel.collectives.async_collective import wait_for_all
from parallel.config import ParallelConfig, Recompute


def apply_recompute(model: LongCat, config: ParallelConfig) -> None:
    """Let a model's layers recompute as configured, in place: the values of a list, or (`full`) whole layers.

    A layer's statistics are returned by its first forward; what the second one counts goes nowhere.
    """
    for module in model.modules():
        if isinstance(module, ShortcutLayer | MTPLayer):
            recompute_layer(module, config)


def recompute_layer(layer: ShortcutLayer | MTPLayer, config: ParallelConfig) -> None:
    """`apply_recompute` for one layer."""
    if config.recompute == Recompute.full:
        checkpoint_method(layer, "forward")
    elif config.recomputed_values:
        recompute_values(layer, config.recomputed_values)


def recompute_values(layer: nn.Module, values: Collection[Value]) -> None:
    """Let the backward of a layer compute ``values`` again."""
    plain = layer.forward

    def forward(*arguments: Any) -> Any:
        with recomputing(values):
            return plain(*arguments)

    layer.forward = forward  # type: ignore[method-assign]


def checkpoint_method(module: nn.Module, method: str) -> None:
    plain = getattr(module, method)

    def once(*arguments: Tensor | None) -> Any:
        with wait_for_all():
            return plain(*arguments)

    def twice(*arguments: Tensor | None) -> Any:
        # No early stop: it would leave collectives to `wait_for_all`, where no compute overlaps with them
        return checkpoint(once, *arguments, use_reentrant=False, preserve_rng_state=False, early_stop=False)

    setattr(module, method, twice)
