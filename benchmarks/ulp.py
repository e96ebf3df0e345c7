"""Errors of the model's operators against plain torch expressions in float64, in units in the last place (ULP).

    python -m benchmarks.ulp

Forward and backward, over the widths of the presets, eager and fused (`parallel.compile`). The unit is that of the
largest number in the row of the exact result. Inputs are random and already of the dtype, so what is measured is the
operator's own rounding. `benchmarks.kernels` has the operators with Triton kernels.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import print_json, print_table
from longcat.ops.attention import causal_attention
from longcat.ops.cross_entropy import linear_cross_entropy
from longcat.ops.elementwise import rms_norm
from longcat.ops.fusion import fuse
from longcat.ops.grouped import grouped_linear
from longcat.ops.matmul import gated_linear, linear
from longcat.ops.rotation import rotary
from longcat.rope import rotary_angles

Function = Callable[..., Tensor]


class Case(NamedTuple):
    """An operator on one shape: ours and plain torch's, on random tensors of these shapes."""

    name: str
    ours: Function
    plain: Function
    shapes: list[tuple[int, ...]]


def plain_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * gain


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    length = query.shape[2]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(hidden, float("-inf"))
    return (torch.softmax(scores, -1) @ value).transpose(1, 2)


def plain_rotary(x: Tensor) -> Tensor:
    angles = rotary_angles(torch.arange(x.shape[-3]), x.shape[-1], 1e6).to(torch.complex128)[:, None]
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * angles).flatten(-2)


def case_loss(width: int, vocabulary: int) -> Case:
    labels = torch.arange(256) * 7 % vocabulary
    valid = torch.ones(256, dtype=torch.bool)
    return Case(
        f"cross-entropy, {width} × {vocabulary}",
        lambda x, w: linear_cross_entropy(x, w, labels, valid)[0][None],
        lambda x, w: F.cross_entropy(x @ w.t(), labels, reduction="sum")[None],
        [(256, width), (vocabulary, width)],
    )


def case_experts(width: int, hidden: int) -> Case:
    counts = [100, 0, 28, 128]
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)

    def plain(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([part @ one.t() for part, one in zip(x.split(counts), weight, strict=True)])

    ours = lambda x, weight: grouped_linear(x, weight, ends)  # noqa: E731
    return Case(f"experts, {width} → {hidden}", ours, plain, [(256, width), (4, hidden, width)])


def cases() -> list[Case]:
    found = []
    for width, hidden, rope in ((512, 1024, 32), (768, 1536, 64), (6144, 12288, 64)):
        found += [
            Case(f"RMSNorm, {width}", lambda x, g: rms_norm(x, g, 1e-5), plain_norm, [(256, width), (width,)]),
            Case(
                f"SwiGLU and linear, {hidden} → {width}",
                gated_linear,
                lambda a, b, w: F.linear(F.silu(a) * b, w),
                [(256, hidden), (256, hidden), (width, hidden)],
            ),
            Case(f"linear, {width} → {hidden}", linear, F.linear, [(256, width), (hidden, width)]),
            Case(
                f"rotary, {rope}",
                lambda x: rotary(x, rotary_angles(torch.arange(x.shape[-3]), x.shape[-1], 1e6)),
                plain_rotary,
                [(2, 512, 4, rope)],
            ),
        ]
    found += [case_experts(512, 512), case_experts(6144, 4096), case_loss(512, 8192), case_loss(768, 32768)]
    for heads, keys, values in ((8, 96, 64), (8, 192, 128)):
        shapes = [(1, 512, heads, keys), (1, 512, heads, keys), (1, 512, heads, values)]
        scaled = lambda q, k, v: causal_attention(q, k, v, q.shape[-1] ** -0.5, None)  # noqa: E731
        found.append(Case(f"attention, {keys} / {values}", scaled, plain_attention, shapes))
    return list({case.name: case for case in found}.values())


def units(ours: Tensor, exact: Tensor) -> float:
    """The largest error, in ULP of the largest number in the exact row."""
    largest = exact.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    unit = torch.exp2(torch.floor(torch.log2(largest))) * torch.finfo(ours.dtype).eps
    return float(((ours.double() - exact) / unit).abs().max())


def errors(case: Case, dtype: torch.dtype) -> tuple[float, float]:
    """Of the result, and the largest of the gradients."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(*shape, generator=generator).to(dtype) for shape in case.shapes]
    if len(drawn) == 2 and drawn[1].dim() > 1:  # matrices, so that results are near 1
        drawn[1] = drawn[1] / drawn[1].shape[-1] ** 0.5
    given = [one.clone().requires_grad_() for one in drawn]
    wide = [one.double().requires_grad_() for one in drawn]
    result, exact = case.ours(*given), case.plain(*wide)
    error = units(result.detach(), exact.detach())
    upstream = torch.randn(exact.shape, generator=generator).to(result.dtype)
    got = torch.autograd.grad(result, given, upstream)
    wanted = torch.autograd.grad(exact, wide, upstream.double())
    return error, max(units(mine, theirs) for mine, theirs in zip(got, wanted, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.parse_args()
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for fused in (False, True):
        fuse(fused)
        for dtype in (torch.float32, torch.bfloat16):
            label = f"{str(dtype).removeprefix('torch.')}{', fused' if fused else ''}"
            found[label] = {case.name: errors(case, dtype) for case in cases()}
    fuse(False)
    names = list(next(iter(found.values())))
    rows = [[name, *(f"{of[name][0]:.2f} / {of[name][1]:.2f}" for of in found.values())] for name in names]
    print_table("largest error, ULP: of the result / of its gradients", ["operator", *found], rows)
    print_json("ulp", {"ulp": found})


if __name__ == "__main__":
    main()
