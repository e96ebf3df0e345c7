"""Names and shapes of both Hugging Face layouts (section 15 of the equations), and a model's tensors in them.

`released` is what serving engines and transformers 4.57 read. `transformers` is what transformers 5.23 reads, which
also expects gate and up projections of the identity experts: they are zeros that no token uses. Both have the MTP
layer under its served names, with a copy of the model's embedding.
"""

# N FFN experts, Z identity experts

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

import torch
from torch import Tensor

from longcat.config import ModelConfig
from longcat.names import Box, pieces
from train.checkpoint.offline_reader import TensorSource, full_box, stored_shapes

PREDICTION = "model.mtp."
PREDICTION_EMBEDDING = f"{PREDICTION}embed_tokens.weight"


class Layout(StrEnum):
    """Names of the two layouts."""

    released = "released"
    transformers = "transformers"


class MetaSource:
    """A `TensorSource` of meta tensors, for names and shapes."""

    def boxes(self, stored_name: str, shape: tuple[int, ...]) -> list[Box]:
        return [full_box(shape)]

    def read(self, stored_name: str, shape: tuple[int, ...], box: Box) -> Tensor:
        return torch.empty(shape, device="meta")


def layout_tensors(config: ModelConfig, layout: Layout, source: TensorSource) -> Iterator[tuple[str, Tensor]]:
    """(name, values) of all tensors of a layout, in an order that does not depend on the source."""
    for stored_name, shape in stored_shapes(config):
        for box in source.boxes(stored_name, shape):
            values = source.read(stored_name, shape, box)
            for piece in pieces(stored_name, shape, box):
                yield piece.name, values[piece.index]
            if stored_name == "embed_tokens.weight" and config.num_mtp_layers:
                yield PREDICTION_EMBEDDING, values
        if layout == Layout.transformers and stored_name.endswith(".experts.gate_up"):
            zeros = torch.zeros(config.expert_hidden_size, config.hidden_size, device=values.device)
            for name in identity_names(f"model.{stored_name.rpartition('.')[0]}", config):
                yield name, zeros


def identity_names(stack: str, config: ModelConfig) -> Iterator[str]:
    """Gate and up projections of the identity experts in ``stack`` of a layer, which only transformers 5.23 has."""
    for expert in range(config.num_experts, config.num_routed):
        for matrix in ("gate_proj", "up_proj"):
            yield f"{stack}.{expert}.{matrix}.weight"


def export_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The exported dtype of a tensor: routers stay float32, in which they compute."""
    return torch.float32 if ".router." in name else dtype


def tensor_sizes(config: ModelConfig, layout: Layout, dtype: torch.dtype) -> list[tuple[str, int]]:
    """(name, bytes) of all tensors of a layout, in the order of `layout_tensors`."""
    return [
        (name, tensor.numel() * export_dtype(name, dtype).itemsize)
        for name, tensor in layout_tensors(config, layout, MetaSource())
    ]
