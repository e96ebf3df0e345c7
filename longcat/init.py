"""Initial values as a function of (seed, logical name, block of rows): every layout starts bitwise identical.

Each rank draws only the row blocks that it stores, never a full stacked tensor (51 GB at 560B).
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn

from longcat.config import ModelConfig
from longcat.names import Box, pieces, stored_state
from longcat.roles import RULES, Initial, role, writes_to_residual

BLOCK_ELEMENTS = 1 << 16  # a block has as many whole rows as fit into this, and at least one


def initialise(model: nn.Module, config: ModelConfig, seed: int) -> None:
    """Fill every parameter and persistent buffer of an unsharded model, in place."""
    for stored_name, tensor in stored_state(model):
        fill(tensor, stored_name, tuple(tensor.shape), None, config, seed)


@torch.no_grad()
def fill(
    local: Tensor, stored_name: str, shape: tuple[int, ...], box: Box | None, config: ModelConfig, seed: int
) -> None:
    """Fill the local part ``box`` (None = all) of the stored tensor of global ``shape``, in place."""
    initial = RULES[role(stored_name)].initial
    if not local.is_floating_point() or initial is Initial.zeros:
        local.zero_()
    elif initial is Initial.ones:
        local.fill_(1.0)
    else:
        std = standard_deviation(stored_name, config)
        for piece in pieces(stored_name, shape, box):
            part = local[piece.index]
            part.copy_(normal_box(seed, piece.name, piece.shape, piece.box).mul_(std))


def standard_deviation(stored_name: str, config: ModelConfig) -> float:
    """A matrix's initial std: smaller for the last matrix of each block, so that noise does not grow with depth."""
    stds = {Initial.embedding_std: config.embedding_std, Initial.hidden_std: config.hidden_std}
    std = stds[RULES[role(stored_name)].initial]
    if writes_to_residual(stored_name):
        return std / math.sqrt(4 * config.num_layers)  # 2 attention and 2 FFN blocks per layer
    return std


def normal_box(seed: int, name: str, shape: tuple[int, ...], box: Box) -> Tensor:
    """Standard normal float32 values of the logical matrix ``name`` [rows, columns] inside ``box``."""
    (start, stop), (left, right) = box
    columns = shape[1]
    height = max(1, BLOCK_ELEMENTS // columns)
    out = torch.empty(stop - start, right - left)
    for block in range(start // height, -(-stop // height)):
        top, bottom = block * height, min((block + 1) * height, shape[0])
        generator = torch.Generator().manual_seed(block_seed(seed, name, block))
        values = torch.randn(bottom - top, columns, generator=generator)
        low, high = max(start, top), min(stop, bottom)
        out[low - start : high - start] = values[low - top : high - top, left:right]
    return out


def block_seed(seed: int, name: str, block: int) -> int:
    """A 63-bit seed that depends only on its three arguments (Python's own hash is salted)."""
    digest = hashlib.blake2b(f"{seed}|{name}|{block}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
