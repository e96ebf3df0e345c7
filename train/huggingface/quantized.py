"""Weights in 8-bit floating point: blocks of e4m3 numbers with a scale each, as the released FP8 files have them."""

# O rows, I columns of a weight

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longcat.errors import ConfigError
from longcat.names import Box
from train.huggingface.config_json import CONFIG, FOLDER
from train.huggingface.values import number, read_json

FP8 = "F8_E4M3"  # as safetensors names it
WEIGHT, SCALE = ".weight", ".weight_scale_inv"  # end the names of a matrix and of its scales, which multiply it
Block = tuple[int, int]  # rows and columns that share a scale
# Of quantization_config: which layers are not quantised (their tensors say so themselves), and how an engine rounds
# activations, which are not rounded here
IGNORED = ("ignored_layers", "modules_to_not_convert", "activation_scheme", "scale_fmt", "weight_block_size")


def read_block(folder: Path) -> Block | None:
    """The block size of a folder's quantised weights; None without quantisation.

    Raises:
        ConfigError: another kind of quantisation, or an unknown field of it.
    """
    path = folder / CONFIG
    stated = read_json(path, FOLDER).get("quantization_config")
    if stated in (None, {}):
        return None
    if not isinstance(stated, dict):
        raise ConfigError(f"{path}: quantization_config is {stated!r}; it must be an object or null, correct it")
    for name, value in stated.items():
        wanted = {"quant_method": "fp8", "fmt": "e4m3"}.get(name, value if name in IGNORED else None)
        if value is not None and value != wanted:
            raise ConfigError(
                f"{path}: quantization_config.{name} is {value!r}; only fp8 in the format e4m3 with weight_block_size "
                f"can be read, so convert the weights to bfloat16 first"
            )
    if stated.get("quant_method") is None:
        raise ConfigError(f"{path}: quantization_config has no quant_method; add it, for instance fp8")
    sizes = stated.get("weight_block_size")
    if not isinstance(sizes, list) or len(sizes) != 2:
        raise ConfigError(
            f"{path}: quantization_config.weight_block_size is {sizes!r}; it must be two numbers, such as [128, 128]"
        )
    rows, columns = (number(path, "quantization_config.weight_block_size", size) for size in sizes)
    if rows < 1 or columns < 1:
        raise ConfigError(f"{path}: quantization_config.weight_block_size is {sizes!r}; both must be at least 1")
    return rows, columns


def scale_name(name: str) -> str:
    """The name of a weight's scales."""
    return f"{name.removesuffix(WEIGHT)}{SCALE}"


def scale_shape(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """The shape of the scales of a weight [O, I]."""
    return tuple(math.ceil(size / part) for size, part in zip(shape, block, strict=True))


def dequantize(values: Tensor, scales: Tensor, box: Box, block: Block) -> Tensor:
    """The part ``box`` of a weight, float32: ``values`` in e4m3 times the ``scales`` of the weight's blocks."""
    rows, columns = (torch.arange(start, stop) // part for (start, stop), part in zip(box, block, strict=True))
    return values.float() * scales.float()[rows][:, columns]


def check_quantized(folder: Path, names: Any, dtypes: dict[str, str], block: Block | None) -> None:
    """Raise ConfigError where quantised weights, their scales and config.json do not belong together.

    ``names`` are the weights that are read, ``dtypes`` the type of each tensor in the files.
    """
    quantized = {name for name in names if dtypes[name] == FP8}
    if block is None and quantized:
        raise ConfigError(
            f"{folder}: {min(quantized)} is {FP8} and config.json has no quantization_config; restore it, or convert "
            f"the weights"
        )
    if block is not None and not quantized:
        raise ConfigError(
            f"{folder}: config.json has a quantization_config and no weight is {FP8}; remove it if the weights are not "
            f"quantised"
        )
    for name in sorted(names):
        scales = scale_name(name)
        if (name in quantized) != (scales in dtypes):
            what = "has no scales" if name in quantized else f"is {dtypes[name]} and has scales as if it were {FP8}"
            raise ConfigError(f"{folder}: {name} {what} ({scales}); restore the files")
