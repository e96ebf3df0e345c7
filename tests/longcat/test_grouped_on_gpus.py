"""Experts' products on GPUs without torch's grouped kernel copy no sizes to the host and loop over no experts."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from longcat.ops.grouped import grouped_gated_linear, grouped_linear, torch_groups
from longcat.ops.torch_internals import TorchDispatchMode, operator_name
from parallel.kernels.shapes import shapes_on_meta

HOST = ("_local_scalar_dense", "nonzero", "item", "is_nonzero")


@pytest.mark.parametrize(
    ("capability", "dtype", "has_kernel"),
    [
        ((9, 0), torch.bfloat16, True),
        ((10, 0), torch.bfloat16, True),
        ((9, 0), torch.float32, False),
        ((8, 0), torch.bfloat16, False),
        ((12, 0), torch.bfloat16, False),
    ],
)
def test_where_torch_has_a_grouped_kernel(capability: tuple[int, int], dtype: torch.dtype, has_kernel: bool) -> None:
    assert torch_groups(capability, dtype) == has_kernel


class Names(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        outputs = [one for one in (out if isinstance(out, tuple) else (out,)) if isinstance(one, Tensor)]
        self.found[operator_name(func)] += 1
        self.found["copies"] += any(one.device.type == "cpu" for one in outputs)
        return out


@pytest.mark.parametrize(
    ("capability", "dtype", "products"),
    [
        ((9, 0), torch.bfloat16, {"_grouped_mm": 6}),
        ((9, 0), torch.float32, {"grouped_rows": 4, "grouped_sums": 2}),
        ((8, 0), torch.bfloat16, {"grouped_rows": 4, "grouped_sums": 2}),
    ],
    ids=["hopper", "float32", "a100"],
)
def test_experts_copy_nothing_to_the_host(
    capability: tuple[int, int], dtype: torch.dtype, products: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SwiGLU experts forward and backward on the meta device, by the kernel that a GPU would run."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    with torch.device("meta"):
        rows = torch.empty(64, 32, dtype=dtype, requires_grad=True)
        into = torch.empty(4, 48, 32, dtype=dtype, requires_grad=True)
        back = torch.empty(4, 32, 24, dtype=dtype, requires_grad=True)
        ends = torch.empty(4, dtype=torch.int32)
    with shapes_on_meta(), Names() as names:
        out = grouped_gated_linear(grouped_linear(rows, into, ends), back, ends)
        out.backward(torch.empty_like(out))
    assert {name: count for name, count in names.found.items() if "grouped" in name} == products
    assert not [name for name in (*HOST, "copies") if names.found[name]]


def test_launching_a_kernel_reads_no_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launches themselves, with stand-ins for the compiled kernels: on meta a read of a value would fail."""
    pytest.importorskip("triton", reason="needs the triton package, which .[dev] brings")
    from parallel.kernels import grouped

    grids: list[tuple[int, ...]] = []

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *args, **sizes: None

    monkeypatch.setattr(grouped, "rows_kernel", Kernel())
    monkeypatch.setattr(grouped, "sums_kernel", Kernel())
    with torch.device("meta"), Names() as names:
        rows, ends = torch.empty(300, 32), torch.empty(4, dtype=torch.int32)
        assert grouped.grouped_rows(rows, torch.empty(4, 32, 48), ends).shape == (300, 48)
        assert grouped.grouped_sums(torch.empty(300, 48), rows, ends).shape == (4, 48, 32)
    assert grids == [(5 + 4, 1), (4, 1, 1)]
    assert not [name for name in (*HOST, "copies") if names.found[name]]
