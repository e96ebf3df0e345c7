"""Figures of a model's health by layer, as metrics."""

# L layers, N FFN experts, Z identity experts

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from longcat.config import ModelConfig
from longcat.counts import count_parameters
from longcat.names import OTHER_PARTS


def part_names(num_layers: int) -> list[str]:
    """Names of the parts of a model by `part_number`."""
    return [*(f"layer_{number}" for number in range(num_layers)), *OTHER_PARTS]


def norms_by_part(squares: Tensor, use_mtp: bool) -> dict[str, float | None]:
    """Gradient norms as metrics, from their squares by `part_number`; MTP's is None while it is off."""
    names = [f"grad_norm/{part}" for part in part_names(len(squares) - len(OTHER_PARTS))]
    norms: dict[str, float | None] = dict(zip(names, squares.sqrt().tolist(), strict=True))
    return norms if use_mtp else norms | {"grad_norm/mtp": None}


def part_sizes(model: ModelConfig) -> list[int]:
    """Parameters of each part of a model by `part_number`."""
    counts = count_parameters(model)
    outside = {"embedding": counts.embedding, "head": counts.head + model.hidden_size, "mtp": counts.mtp}
    layer = (counts.total - counts.embedding - counts.head - model.hidden_size) // model.num_layers
    return [layer] * model.num_layers + [outside[name] for name in OTHER_PARTS]


def gradient_rms(
    part_squares: Tensor, norm: float, model: ModelConfig, clip: float, use_mtp: bool
) -> dict[str, float | None]:
    """Root mean square of each part's gradient as AdamW gets it, after clipping; MTP's is None while it is off."""
    scale = clip / norm if clip and norm > clip else 1.0
    means = part_squares / torch.tensor(part_sizes(model), dtype=torch.float64).clamp_min(1.0)
    found: dict[str, float | None] = dict(
        zip(part_names(model.num_layers), (scale * means.sqrt()).tolist(), strict=True)
    )
    return found if use_mtp else found | {"mtp": None}


def loads_by_layer(counts: Tensor, model: ModelConfig) -> list[float]:
    """Load of each layer's busiest FFN expert over the mean, from the selections [L, N+Z]."""
    ffn = counts[:, : model.num_experts].double()
    found: list[float] = (ffn.amax(1) / ffn.mean(1).clamp_min(1e-9)).tolist()
    return found


def ratios_by_layer(gradients: Tensor) -> list[float]:
    """R_g of each layer (section 9) from ∇_P of the task's and of the balance loss [2, L, N+Z]."""
    task, balance = torch.linalg.vector_norm(gradients, dim=-1)
    found: list[float] = (balance / task.clamp_min(1e-300)).tolist()
    return found


def similarities_by_layer(directions: Tensor, num_rows: int) -> list[float]:
    """Mean pairwise cosine of each router's rows (section 9), from the sums of its rows of length 1 [L, D]."""
    pairs = directions.square().sum(1) - num_rows
    found: list[float] = (pairs / max(num_rows * (num_rows - 1), 1)).tolist()
    return found


def bias_ranges(biases: Tensor, model: ModelConfig) -> list[float]:
    """Largest minus smallest selection bias of each layer's FFN experts, from [L, N+Z]."""
    ffn = biases[:, : model.num_experts]
    found: list[float] = (ffn.amax(1) - ffn.amin(1)).tolist()
    return found


def named(key: str, values: Sequence[float]) -> dict[str, Any]:
    """`key/layer_0`, … → value."""
    return {f"{key}/layer_{number}": value for number, value in enumerate(values)}
