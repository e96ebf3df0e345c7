"""Copies of what an operator call holds, as plain values that a file can keep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from longcat.ops.permute import Permutation

PERMUTATION, FUNCTION = "__permutation__", "__function__"


def ignore(compute: Callable[[], Tensor]) -> None:
    """Takes the place of a store of weight gradients: the deferred computation is a call of its own."""


def encoded(value: Any) -> Any:
    """Plain values and tensors on the CPU for whatever a call holds."""
    if isinstance(value, Permutation):
        return {PERMUTATION: [encoded(part) for part in astuple(value)]}
    if isinstance(value, Tensor):
        if 0 in value.stride():  # an expanded tensor
            return value.detach().cpu().clone()
        copy = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)  # kernels differ by strides
        return copy.copy_(value.detach())
    if isinstance(value, dict):
        return {key: encoded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return tuple(encoded(part) for part in value)
    if callable(value):
        return FUNCTION  # a store of weight gradients
    return value


def decoded(value: Any) -> Any:
    """What was `encoded`."""
    if isinstance(value, dict):
        if set(value) == {PERMUTATION}:
            return Permutation(*value[PERMUTATION])
        return {key: decoded(part) for key, part in value.items()}
    if isinstance(value, tuple):
        return tuple(decoded(part) for part in value)
    return ignore if value == FUNCTION and isinstance(value, str) else value
