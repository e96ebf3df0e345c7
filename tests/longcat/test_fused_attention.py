"""Attention for GPUs, tested without one: choice of kernel, operands and bounds by stand-in kernels, sizes on meta.

The stand-ins compute in plain torch what the documentation of the kernels says; they refuse what the kernels refuse.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longcat.documents import Documents
from longcat.ops import fused_attention
from longcat.ops.attention import causal_attention
from longcat.ops.calls import set_observer
from longcat.ops.fused_attention import Backend, choose_backend
from longcat.ops.matmul import linear
from longcat.ops.recomputed import recomputing
from longcat.ops.torch_internals import KernelCall
from longcat.recompute_values import Value
from parallel.sdc.recompute import Recomputer

A100, H100, B200, V100 = (8, 0), (9, 0), (10, 0), (7, 0)
BF16, FP32 = torch.bfloat16, torch.float32
FLASH_WIDTHS = (192, 128)


@pytest.mark.parametrize(
    ("capability", "dtype", "deterministic", "widths", "is_square", "documents", "expected"),
    [
        (H100, BF16, True, FLASH_WIDTHS, True, False, Backend.flash),
        (H100, BF16, True, FLASH_WIDTHS, False, True, Backend.flash),
        (H100, BF16, False, FLASH_WIDTHS, True, False, Backend.cudnn),
        (B200, BF16, False, FLASH_WIDTHS, True, False, Backend.cudnn),
        (H100, BF16, False, FLASH_WIDTHS, False, False, Backend.flash),  # context parallelism
        (H100, BF16, False, FLASH_WIDTHS, True, True, Backend.flash),
        (H100, BF16, False, (160, 160), True, False, Backend.flash),  # too wide for cuDNN's backward
        (H100, BF16, False, (36, 20), True, False, Backend.flash),  # no multiples of 8: filled up
        (H100, BF16, True, (320, 256), True, False, Backend.efficient),
        (A100, BF16, False, FLASH_WIDTHS, True, False, Backend.flash),
        (V100, torch.float16, True, FLASH_WIDTHS, True, False, Backend.efficient),
        (H100, FP32, True, FLASH_WIDTHS, True, True, Backend.efficient),
    ],
)
def test_choice_of_kernel(
    capability: tuple[int, int],
    dtype: torch.dtype,
    deterministic: bool,
    widths: tuple[int, int],
    is_square: bool,
    documents: bool,
    expected: Backend,
) -> None:
    assert choose_backend(capability, dtype, deterministic, widths, is_square, documents) == expected


class StandIn:
    """A kernel: causal, aligned at the last positions, by segments where bounds are given."""

    wants_one_width = False

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, call: KernelCall) -> tuple[Tensor, ...]:
        if cls.wants_one_width:
            assert query.shape[-1] == key.shape[-1] == value.shape[-1] and query.shape[-1] % 8 == 0
        if call.query_bounds is None:
            return (attend(query, key, value, call.scale),)
        assert call.key_bounds is not None
        queries, keys = call.query_bounds.diff(), call.key_bounds.diff()
        assert call.query_bounds.dtype == call.key_bounds.dtype == torch.int32
        assert (int(queries.max()), int(keys.max())) == (call.longest_queries, call.longest_keys)
        assert int(call.query_bounds[-1]) == query.shape[0] and int(call.key_bounds[-1]) == key.shape[0]
        parts = zip(query.split(queries.tolist()), key.split(keys.tolist()), value.split(keys.tolist()), strict=True)
        return (torch.cat([attend(q[None], k[None], v[None], call.scale)[0] for q, k, v in parts]),)

    @classmethod
    def backward(
        cls, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, state: list[Tensor], call: KernelCall
    ) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (query, key, value)]
            again = cls.forward(*leaves, call)[0]
        assert torch.equal(again, out)
        return torch.autograd.grad(again, leaves, grad)


class FlashStandIn(StandIn):
    wants_one_width = True


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """[B, q, H, W], [B, S, H, W] → [B, q, H, W]; the last query sees all keys."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    rows, columns = q.shape[2], k.shape[2]
    hidden = torch.ones(rows, columns, dtype=torch.bool).triu(1 + columns - rows)
    return (torch.softmax((q @ k.mT * scale).masked_fill(hidden, float("-inf")), -1) @ v).transpose(1, 2)


RANGES = {"all": None, "context_parallel": [(12, 24), (60, 72)], "first_and_last": [(0, 12), (84, 96)]}


@pytest.mark.parametrize("backend", [Backend.flash, Backend.efficient])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("masked", [False, True], ids=["one_document", "documents"])
@pytest.mark.parametrize("ranges", RANGES)
def test_operands_and_bounds(
    backend: Backend, batch: int, masked: bool, ranges: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels get operands with which they compute what the CPU's blocks compute, gradients too."""
    monkeypatch.setattr(fused_attention, "KERNELS", {Backend.flash: FlashStandIn, Backend.efficient: StandIn})
    monkeypatch.setattr(fused_attention, "choose_backend", lambda *_: backend)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: H100)
    generator = torch.Generator().manual_seed(3)
    length, held = 96, RANGES[ranges] or [(0, 96)]
    query, key, value = (
        torch.randn(batch, rows, 3, width, dtype=torch.float64, generator=generator, requires_grad=True)
        for rows, width in ((sum(stop - start for start, stop in held), 12), (length, 12), (length, 6))
    )
    numbers = (torch.rand(batch, length, generator=generator) < 0.08).cumsum(1)
    documents = Documents.of(numbers) if masked else None
    expected = causal_attention(query, key, value, 0.3, documents, held)
    found = fused_attention.fused_attention(query, key, value, 0.3, documents, held)
    upstream = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # the blocks' softmax is float32
    for mine, theirs in zip(
        torch.autograd.grad(found, (query, key, value), upstream),
        torch.autograd.grad(expected, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", [Backend.flash, Backend.efficient])
@pytest.mark.parametrize(("nope", "rope", "width"), [(20, 12, 32), (28, 4, 32), (24, 8, 32)])
def test_kernels_read_aligned_values(
    backend: Backend, nope: int, rope: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels load 16 bytes at once; a view of expanded latents that is aligned is read where it is."""
    seen: list[Tensor] = []

    class Kernel(StandIn):
        @classmethod
        def forward(cls, query: Tensor, key: Tensor, value: Tensor, call: KernelCall) -> tuple[Tensor, ...]:
            seen.append(value)
            return super().forward(query, key, value, call)

    monkeypatch.setattr(fused_attention, "KERNELS", {backend: Kernel})
    monkeypatch.setattr(fused_attention, "choose_backend", lambda *_: backend)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: H100)
    query, key = (torch.randn(1, 16, 2, nope + rope, dtype=BF16) for _ in range(2))
    expanded = torch.randn(1, 16, 2, nope + width, dtype=BF16, requires_grad=True)
    value = expanded[..., -max(nope + rope, width) :]
    out = fused_attention.fused_attention(query, key, value, 0.3, None, [(0, 16)], width)
    wanted = attend(query, key, expanded[..., nope:], 0.3)
    assert torch.equal(out, wanted)
    (grad,), (wanted_grad,) = (torch.autograd.grad(one.sum(), expanded) for one in (out, wanted))
    assert torch.equal(grad, wanted_grad)
    for read in seen:
        assert all(place % 8 == 0 for place in (read.storage_offset(), *read.stride()[:-1]))
    is_view = seen[0].untyped_storage().data_ptr() == expanded.untyped_storage().data_ptr()
    assert is_view == (nope == 24)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returned, and the operations' names."""

    elements = 0

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        self.names.append(func.__name__)
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return result


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=["flash", "efficient"])
@pytest.mark.parametrize("cp", [1, 8])
def test_nothing_of_size_s_squared(dtype: torch.dtype, cp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 131,072 positions with documents, on the meta device: no tensor is larger than the padded operands."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: H100)
    length, heads = 131072, 2
    held = [(0, length)] if cp == 1 else [(0, length // 16), (length - length // 16, length)]
    on_host = Documents.of((torch.arange(length) // 5000)[None])
    documents = Documents(torch.empty(1, length, dtype=torch.int64, device="meta"), on_host.starts)
    with Largest() as largest:
        queries = sum(stop - start for start, stop in held)
        query, key, value = (
            torch.empty(1, rows, heads, width, dtype=dtype, device="meta", requires_grad=True)
            for rows, width in ((queries, 192), (length, 192), (length, 128))
        )
        out = fused_attention.fused_attention(query, key, value, 0.07, documents, held)
        assert out.shape == (1, queries, heads, 128)
        if dtype == BF16:  # torch 2.13's shapes of the efficient kernel's backward are wrong (it forgets `out`)
            out.sum().backward()
            assert value.grad is not None and value.grad.shape == value.shape
    assert largest.elements <= length * heads * 192
    kernel = "_flash_attention" if dtype == BF16 else "_efficient_attention"
    assert sum(name.startswith(kernel) for name in largest.names) == (2 if dtype == BF16 else 1) * len(held)


def test_calls_can_be_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """What watches for corruption runs forward and backward again, from the context's plain values."""
    monkeypatch.setattr(fused_attention, "KERNELS", {Backend.flash: FlashStandIn})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: H100)
    shapes = ((16, 24), (32, 24), (32, 16))  # positions, width
    query, key, value = (torch.randn(1, rows, 2, width, dtype=BF16, requires_grad=True) for rows, width in shapes)
    documents = Documents.of((torch.arange(32) // 9)[None])
    recomputer = Recomputer(1)
    try:
        for step in range(3):  # the first step counts the calls
            recomputer.begin_step(step)
            fused_attention.fused_attention(query, key, value, 0.3, documents, [(0, 8), (24, 32)]).sum().backward()
            recomputer.end_step()
    finally:
        set_observer(None)
    assert recomputer.checked == 2 and not recomputer.differences


def test_cudnns_attention_runs_once_where_it_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for its kernel. torch's node keeps the result, so a second run would save nothing."""
    monkeypatch.setattr(fused_attention, "choose_backend", lambda *_: Backend.cudnn)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.nn.attention, "sdpa_kernel", lambda _: nullcontext())
    runs = []
    plain = fused_attention.scaled_dot_product_attention

    def counted(*args: Tensor, **options: Any) -> Tensor:
        runs.append(1)
        return plain(*args, **options)

    monkeypatch.setattr(fused_attention, "scaled_dot_product_attention", counted)
    operands = [torch.randn(1, 16, 2, 8, requires_grad=True) for _ in range(3)]

    def gradients(values: list[Value]) -> tuple[Tensor, ...]:
        with recomputing(values):
            out = fused_attention.fused_attention(*operands, 0.3, None, [(0, 16)])
            total = linear(out.flatten(2), weight).sum()
        del out
        return torch.autograd.grad(total, (*operands, weight))

    weight = torch.randn(4, 16, requires_grad=True)
    kept = gradients([])
    assert len(runs) == 1
    again = gradients([Value.attention])
    assert len(runs) == 2
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))
