"""Each kernel of attention on a GPU: errors against float64, repeated bits, times at the widths of `model=flash`."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torch import Tensor

import longcat.ops.fused_attention
from benchmarks.gpu.kernels import milliseconds
from benchmarks.gpu.part import Row, attempt, need_gpu
from longcat.ops.attention import causal_attention
from longcat.ops.fused_attention import Backend

HEADS, KEY_WIDTH, VALUE_WIDTH = 8, 192, 128
SCALE = KEY_WIDTH**-0.5
TOLERANCE = 2e-2  # of ‖difference‖ / ‖value‖, bfloat16
ALWAYS_REPEATS = (Backend.flash, Backend.efficient)


def operands(length: int, device: torch.device) -> list[Tensor]:
    """Query, key, value and the gradient of the result; on the CPU's generator, so that every run has the same."""
    generator = torch.Generator().manual_seed(0)
    widths = (KEY_WIDTH, KEY_WIDTH, VALUE_WIDTH, VALUE_WIDTH)
    drawn = [torch.randn(1, length, HEADS, width, generator=generator).to(device, torch.bfloat16) for width in widths]
    return [x.requires_grad_(number < 3) for number, x in enumerate(drawn)]


def forward_and_backward(inputs: list[Tensor]) -> list[Tensor]:
    query, key, value, grad = inputs
    out = causal_attention(query, key, value, SCALE, None)
    return [out.detach(), *torch.autograd.grad(out, (query, key, value), grad)]


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.cpu().double() - exact).norm() / exact.norm())


def kernel(backend: Backend, device: torch.device) -> list[Row]:
    """One kernel, whichever would be chosen."""
    inputs = operands(512, device)
    exact = forward_and_backward([x.detach().cpu().double().requires_grad_(x.requires_grad) for x in inputs])
    with patch.object(longcat.ops.fused_attention, "choose_backend", lambda *_: backend):
        torch.use_deterministic_algorithms(backend in ALWAYS_REPEATS)
        first = forward_and_backward(inputs)
        repeats = all(
            torch.equal(one, other)
            for _ in range(5)
            for one, other in zip(forward_and_backward(inputs), first, strict=True)
        )
        large = operands(8192, device)
        took = milliseconds(lambda: forward_and_backward(large), rounds=10)
    error = max(relative(one, other) for one, other in zip(first, exact, strict=True))
    wanted, met = ("same", repeats) if backend in ALWAYS_REPEATS else ("", None)
    return [
        Row(f"{backend}: error against float64", f"{error:.1e}", f"{TOLERANCE:.0e}", error <= TOLERANCE),
        Row(f"{backend}: bits of 6 runs", "same" if repeats else "others", wanted, met),
        Row(f"{backend}: forward and backward, 8,192 positions, {HEADS} heads", f"{took:.2f} ms"),
    ]


def run(device: torch.device) -> list[Row]:
    """All kernels."""
    need_gpu(device)
    return [row for backend in Backend for row in attempt(str(backend), kernel, backend, device)]
