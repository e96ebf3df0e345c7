"""Results of the operators that have a kernel on GPUs, by shape alone: for traces and rehearsals without values."""

# T tokens, K chosen, P rows (FFN selections), D width, F hidden width, R rows

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longcat.ops import embedding, grouped, one_pass, permute, rows, selections  # noqa: F401 (they declare the operators)
from longcat.ops.torch_library import NAME


def _plan(indices: Tensor, num_experts: int, num_routed: int, num_rows: int | None = None) -> tuple[Tensor, ...]:
    if num_rows is None:
        raise ValueError("the number of rows is a value; give num_rows")
    counts = indices.new_empty(num_routed)
    return indices.new_empty(num_rows), indices.new_empty(num_rows), torch.empty_like(indices), counts


def _combine_rows_backward(
    grad: Tensor, gates: Tensor, token: Tensor, selection: Tensor, row_index: Tensor, x: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    grad_rows = grad.new_empty(token.shape[0], grad.shape[1])
    return grad_rows, torch.empty_like(gates), grad.new_empty(0) if x is None else torch.empty_like(x)


def _join_keys(k_nope: Tensor, k_rope: Tensor, angles: Tensor) -> Tensor:
    return k_nope.new_empty(*k_nope.shape[:-1], k_nope.shape[-1] + k_rope.shape[-1])


def _keys_and_values_backward(
    grad_key: Tensor, grad_value: Tensor, angles: Tensor, value_width: int
) -> tuple[Tensor, Tensor]:
    rotary = 2 * angles.shape[-1]
    expanded = grad_key.new_empty(*grad_key.shape[:-1], grad_key.shape[-1] - rotary + value_width)
    return expanded, grad_key.new_empty(*grad_key.shape[:2], rotary)


SHAPES: dict[str, Callable[..., Any]] = {
    "plan": _plan,
    "count_selections": lambda indices, num_routed: indices.new_empty(num_routed),
    "spread_gates": lambda grad, indices, num_routed: grad.new_empty(grad.shape[0], num_routed),
    "gather_rows": lambda source, index: source.new_empty(index.shape[0], source.shape[1]),
    "sum_rows": lambda x, index: x.new_empty(index.shape[0], x.shape[1]),
    "combine_rows": lambda values, gates, index, x: values.new_empty(gates.shape[0], values.shape[1]),
    "combine_rows_backward": _combine_rows_backward,
    "dot_rows": lambda a, b: a.new_empty(a.shape[0], dtype=torch.float32),
    "grouped_rows": lambda a, b, ends: a.new_empty(a.shape[0], b.shape[2]),
    "grouped_sums": lambda a, b, ends: a.new_empty(ends.shape[0], a.shape[1], b.shape[1]),
    "norm_rows": lambda x, gain, eps: (x.new_empty(x.shape), x.new_empty(x.shape[0], 1, dtype=torch.float32)),
    "norm_rows_backward": lambda grad, x, gain, inverse: (x.new_empty(x.shape), torch.empty_like(gain)),
    "add_norm_rows": lambda x, y, gain, eps: (
        x.new_empty(x.shape),
        x.new_empty(x.shape),
        x.new_empty(x.shape[0], 1, dtype=torch.float32),
    ),
    "add_norm_rows_backward": lambda grad_total, grad, total, gain, inverse: (
        total.new_empty(total.shape),
        torch.empty_like(gain),
    ),
    "add_three": lambda x, y, z: x.new_empty(x.shape),
    "split_rows": lambda x: x.new_empty(3 * x.shape[0], x.shape[1], dtype=torch.bfloat16),
    "gate_rows": lambda gate, up: gate.new_empty(gate.shape),
    "gate_rows_backward": lambda grad, gate, up: (gate.new_empty(len(gate), 2 * gate.shape[1]), up.new_empty(up.shape)),
    "rotate_": lambda x, angles: x,
    "rotate_back": lambda x, angles: x.new_empty(x.shape),
    "join_keys": _join_keys,
    "keys_and_values_backward": _keys_and_values_backward,
    "embedding_gradient": lambda grad, ids, num_rows: grad.new_empty(num_rows, grad.shape[1]),
}


@contextmanager
def shapes_on_meta() -> Iterator[None]:
    """Let the operators make their results alone on the meta device, as their kernels do on a GPU."""
    library = torch.library.Library(NAME, "IMPL")
    for name, shape in SHAPES.items():
        library.impl(name, shape, "Meta")
    try:
        yield
    finally:
        del library  # its end takes the versions out again
