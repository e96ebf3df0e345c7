"""Depth growth: which layer of the shallow model initialises each layer of the deep one, by names (section 8)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from longcat.config_choices import check_choice
from longcat.errors import ConfigError


class GrowthMethod(StrEnum):
    """Order of the repeated layers."""

    stack = "stack"
    interpose = "interpose"


LAYER = re.compile(r"layers\.(\d+)\.(.+)")  # a layer of the stack; MTP layers are `mtp.layers.…` and do not grow


@dataclass(frozen=True)
class Growth:
    """A model of ``num_layers`` layers grows to ``factor`` times as many.

    `stack` repeats the whole stack (0 1 0 1), the report's method: the grown model applies the old trunk ``factor``
    times. `interpose` repeats each layer in place (0 0 1 1).
    """

    num_layers: int
    factor: int = 2
    method: GrowthMethod = GrowthMethod.stack

    def validate(self) -> None:
        """Raise ConfigError for a factor below 2 or an unknown method."""
        if self.factor < 2:
            raise ConfigError(f"growth.factor={self.factor} adds no layer; use 2 or more")
        check_choice("growth.method", self.method, GrowthMethod)

    @property
    def sources(self) -> list[int]:
        """The old layer that initialises each new layer, by the new layer's number."""
        layers = range(self.num_layers)
        if self.method == GrowthMethod.stack:
            return [layer for _ in range(self.factor) for layer in layers]
        return [layer for layer in layers for _ in range(self.factor)]

    def grown_names(self, stored_name: str) -> list[str]:
        """The stored names of a tensor in the grown model: one for each copy of its layer.

        Tensors outside the stack (embedding, final norm, head, MTP) keep their names.
        """
        layer = layer_of(stored_name)
        if layer is None:
            return [stored_name]
        rest = stored_name.split(".", 2)[2]
        return [f"layers.{number}.{rest}" for number, source in enumerate(self.sources) if source == layer]


def layer_of(stored_name: str) -> int | None:
    """The layer number of a stored tensor; None outside the stack."""
    match = LAYER.fullmatch(stored_name)
    return int(match[1]) if match else None
