"""What of the experts' exchange is covered by computation: the `overlap` section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass

from longcat.errors import ConfigError
from longcat.model import LongCat


@dataclass
class OverlapConfig:
    """Chunks of a micro-batch's tokens: while one is on its way, experts work on another."""

    num_chunks: int = 1

    def validate(self) -> None:
        if self.num_chunks < 1:
            raise ConfigError(f"overlap.num_chunks={self.num_chunks} must be at least 1")


def set_chunks(model: LongCat, config: OverlapConfig) -> None:
    """Let every mixture of experts work in chunks of tokens, in place."""
    for layer in model.shortcut_layers():
        layer.mlp.num_chunks = config.num_chunks
