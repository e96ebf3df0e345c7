"""Names and shapes of both Hugging Face layouts (section 15 of the equations), and the way of a model's values to them.

`released` is what serving engines and transformers 4.57 read. `transformers` is what transformers 5.23 reads, which
wants gate and up projections of the identity experts too: they are zeros that no token meets. The MTP part is in both,
under its served names, with an embedding of its own that repeats the model's.
"""

# N FFN experts, Z identity experts

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longcat.config import ModelConfig
from longcat.names import Box, pieces
from train.checkpoint.read import TensorSource, full_box, stored_shapes

LAYOUTS = ("released", "transformers")
PREDICTION = "model.mtp."
PREDICTION_EMBEDDING = f"{PREDICTION}embed_tokens.weight"


class Outline:
    """A `TensorSource` of tensors without values: what a layout consists of."""

    def boxes(self, stored_name: str, shape: tuple[int, ...]) -> list[Box]:
        return [full_box(shape)]

    def read(self, stored_name: str, shape: tuple[int, ...], box: Box) -> Tensor:
        return torch.empty(shape, device="meta")


def layout_tensors(config: ModelConfig, layout: str, source: TensorSource) -> Iterator[tuple[str, Tensor]]:
    """(name, values) of everything in a layout, in an order that does not depend on the source."""
    for stored_name, shape in stored_shapes(config):
        for box in source.boxes(stored_name, shape):
            values = source.read(stored_name, shape, box)
            for piece in pieces(stored_name, shape, box):
                yield piece.name, values[piece.index]
            if stored_name == "embed_tokens.weight" and config.num_mtp_layers:
                yield PREDICTION_EMBEDDING, values
        if layout == "transformers" and stored_name.endswith(".experts.gate_up"):
            nothing = torch.zeros(config.expert_hidden_size, config.hidden_size, device=values.device)
            for name in identity_names(f"model.{stored_name.rpartition('.')[0]}", config):
                yield name, nothing


def identity_names(stack: str, config: ModelConfig) -> Iterator[str]:
    """Names that only transformers 5.23 has: gate and up projections of identity experts, in ``stack`` of a layer."""
    for expert in range(config.num_experts, config.num_routed):
        for matrix in ("gate_proj", "up_proj"):
            yield f"{stack}.{expert}.{matrix}.weight"


def kept_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is exported in: routers stay float32, as they compute."""
    return torch.float32 if ".router." in name else dtype


def outline(config: ModelConfig, layout: str, dtype: torch.dtype) -> list[tuple[str, int]]:
    """(name, bytes) of everything in a layout, in the order of `layout_tensors`."""
    return [
        (name, tensor.numel() * kept_dtype(name, dtype).itemsize)
        for name, tensor in layout_tensors(config, layout, Outline())
    ]
