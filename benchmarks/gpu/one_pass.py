"""Calls of the operators that run in one pass, at a flash layer's sizes, with torch's own and the bytes they move."""

# T tokens, D width, F hidden width, H heads, N width without positions, R rotary width, V value width

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import rms_norm, silu

from longcat.ops.torch_internals import tree_leaves
from longcat.rope import rotary_angles

TOKENS, WIDTH, HIDDEN, EPS = 8192, 6144, 12288, 1e-5
HEADS, NOPE, ROTARY, VALUE = 64, 128, 64, 128


class Call(NamedTuple):
    """An operator's call, torch's expression for the same, and the bytes of operands and results."""

    ours: Callable[[], Any]
    theirs: Callable[[], Any] | None
    num_bytes: int


def nbytes(*values: Any) -> int:
    return sum(one.nbytes for one in tree_leaves(values) if isinstance(one, Tensor))


def calls(device: torch.device, shrunk: int = 1) -> dict[str, Call]:
    """By operator, in bfloat16; ``shrunk`` divides the number of tokens."""
    ops, tokens = torch.ops.longcat, TOKENS // shrunk

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).bfloat16()

    x, grad, gain = draw(tokens, WIDTH), draw(tokens, WIDTH), torch.ones(WIDTH, device=device)
    gate, up, upstream = draw(tokens, HIDDEN), draw(tokens, HIDDEN), draw(tokens, HIDDEN)
    query, wide = draw(1, tokens, HEADS, NOPE + ROTARY), draw(1, tokens, HEADS, NOPE + ROTARY)
    expanded, k_rope = draw(1, tokens, HEADS, NOPE + VALUE), draw(1, tokens, ROTARY)
    angles = rotary_angles(torch.arange(tokens, device=device), ROTARY, 1e6)
    inverse = ops.norm_rows(x, gain, EPS)[1]
    operands: dict[str, tuple[Any, ...]] = {
        "norm_rows": (x, gain, EPS),
        "norm_rows_backward": (grad, x, gain, inverse),
        "add_norm_rows": (x, grad, gain, EPS),
        "add_norm_rows_backward": (grad, grad, x, gain, inverse),
        "add_three": (x, grad, x),
        "split_rows": (x[: TOKENS // 16 // shrunk].float(),),
        "gate_rows": (gate, up),
        "gate_rows_backward": (upstream, gate, up),
        "rotate_": (query[..., NOPE:], angles),
        "rotate_back": (query, angles),
        "join_keys": (expanded[..., :NOPE], k_rope, angles),
        "keys_and_values_backward": (query, wide, angles, VALUE),
    }
    theirs: dict[str, Callable[[], Any]] = {
        "norm_rows": lambda: rms_norm(x, (WIDTH,), gain.bfloat16(), EPS),
        "gate_rows": lambda: silu(gate) * up,
        "rotate_back": lambda: torch.cat((query[..., :NOPE], _rotated(query[..., NOPE:], angles.conj())), -1),
    }
    found = {}
    for name, given in operands.items():
        ours = partial(getattr(ops, name), *given)
        found[name] = Call(ours, theirs.get(name), nbytes(given, ours()))
    return found


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * angles[:, None]).flatten(-2).to(x.dtype)
