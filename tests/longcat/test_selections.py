"""Selections are counted, and gates selected, with the bits of torch's own operators and without a scatter on a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from longcat.dispatch import LocalDispatcher, LocalPending, Routing
from longcat.layer import ShortcutLayer
from longcat.ops.selections import count_selections, selected_gates
from longcat.ops.torch_internals import TorchDispatchMode, operator_name
from parallel.kernels.shapes import shapes_on_meta
from train.compose import compose

SORTS = ("sort", "unique", "index_put", "scatter", "index_add", "index_copy", "bincount")


def test_gates_and_their_gradient_are_a_gathers() -> None:
    probabilities = torch.rand(50, 9, requires_grad=True)
    indices = torch.rand(50, 9).topk(4).indices
    upstream = torch.randn(50, 4)
    upstream[::7] = -0.0
    gates = selected_gates(probabilities, indices)
    (ours,) = torch.autograd.grad(gates, probabilities, upstream)
    plain = probabilities.gather(1, indices)
    (theirs,) = torch.autograd.grad(plain, probabilities, upstream)
    assert torch.equal(gates, plain)
    assert torch.equal(ours.view(torch.int32), theirs.view(torch.int32))
    assert torch.equal(count_selections(indices, 12), torch.bincount(indices.flatten(), minlength=12))


class Names(TorchDispatchMode):
    """The names of all operators."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found.add(operator_name(func))
        return func(*args, **(kwargs or {}))


def test_a_layer_has_no_scatter_and_no_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward on the meta device, in bfloat16, with a GPU's attention."""

    def start_dispatch(_: LocalDispatcher, chunks: list[tuple[Tensor, Routing]]) -> list[LocalPending]:
        return [LocalPending(x, routing, partial(int, 2 * x.shape[0])) for x, routing in chunks]

    monkeypatch.setattr(LocalDispatcher, "start_dispatch", start_dispatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    config = compose(["model=tiny"]).model
    with torch.device("meta"), shapes_on_meta(), Names() as names:
        layer = ShortcutLayer(config, balance_groups=2).to(torch.bfloat16)
        x = torch.empty(1, 64, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        angles = torch.empty(64, config.qk_rope_head_dim // 2, dtype=torch.complex64)
        y, statistics = layer(x, angles, None)
        torch.autograd.backward((y, statistics.balance), (torch.empty_like(y), torch.empty_like(statistics.balance)))
    assert {"spread_gates", "count_selections", "plan", "combine_rows_backward"} <= names.found
    assert not [name for name in names.found if any(word in name for word in SORTS)]
