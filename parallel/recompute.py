"""Activation recomputation: what the backward computes again instead of keeping it."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longcat.attention import LatentAttention
from longcat.layer import MTPLayer, ShortcutLayer
from longcat.model import LongCat
from parallel.collectives.async_collective import wait_for_all
from parallel.config import Recompute


def apply_recompute(model: LongCat, how: Recompute) -> None:
    """Recompute nothing (`none`), attention from its latents on (`selective`) or whole layers (`full`), in place.

    Queries, keys and values of all heads are many times their latents, so `selective` gives up most of attention's
    memory for the cost of expanding and attending once more. A layer's statistics are returned by its first
    forward; what the second one counts goes nowhere.
    """
    for module in model.modules():
        if how == Recompute.selective and isinstance(module, LatentAttention):
            checkpoint_method(module, "attend")
        elif how == Recompute.full and isinstance(module, ShortcutLayer | MTPLayer):
            checkpoint_method(module, "forward")


def checkpoint_method(module: nn.Module, method: str) -> None:
    plain = getattr(module, method)

    def once(*arguments: Tensor | None) -> Any:
        with wait_for_all():
            return plain(*arguments)

    def twice(*arguments: Tensor | None) -> Any:
        # No early stop: it would leave collectives to `wait_for_all`, where no compute overlaps with them
        return checkpoint(once, *arguments, use_reentrant=False, preserve_rng_state=False, early_stop=False)

    setattr(module, method, twice)
