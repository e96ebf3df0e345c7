"""Token permutation and embedding operators: floors by formula, CPU times, and errors in ULP.

    python -m benchmarks.kernels                  # times at 2,048 tokens of width 512, floors of a flash layer
    python -m benchmarks.kernels --rounds 5

A floor is the bytes that an operator must read and write, over the memory bandwidth: all of them are memory-bound.
Bytes of index tables are left out, as they are below 1 %. ULP: units in the last place.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.common import print_json, print_table, seconds_of
from longcat.ops import embedding as _embedding  # noqa: F401 (declares its operator)
from longcat.ops.permute import Permutation, plan_permutation

H100 = 3.35e12  # bytes per second, by the data sheet


@dataclass(frozen=True)
class Sizes:
    """One micro-batch of one layer."""

    tokens: int
    top_k: int
    experts: int
    zero: int
    width: int
    expert_width: int
    vocabulary: int
    ffn_experts: float  # per token, on average

    def routing(self, seed: int = 0) -> Tensor:
        """Uniformly random selections [T, K]."""
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(self.tokens, self.experts + self.zero, generator=generator).topk(self.top_k).indices

    def ids(self, seed: int = 0) -> Tensor:
        """Token ids [T] of which few are frequent."""
        generator = torch.Generator().manual_seed(seed)
        return (torch.rand(self.tokens, generator=generator) ** 4 * self.vocabulary).long()


FLASH = Sizes(4096, 12, 512, 256, 6144, 2048, 131072, 8.0)
SMALL = Sizes(2048, 6, 32, 16, 512, 256, 32768, 4.0)


class Floor(NamedTuple):
    """The least an operator must move and compute."""

    num_bytes: float
    flops: float


def floors(sizes: Sizes, num_bytes: int = 2) -> dict[str, Floor]:
    """By operator, for numbers of ``num_bytes`` each; T tokens, P = T · K_e rows, D width, F expert width."""
    T, K, D, F, V = sizes.tokens, sizes.top_k, sizes.width, sizes.expert_width, sizes.vocabulary
    P, b = T * sizes.ffn_experts, num_bytes
    return {
        "plan": Floor(8.0 * (2 * T * K + 2 * P), 0.0),
        "gather_rows": Floor((T + P) * D * b, 0.0),
        "sum_rows": Floor((P + T) * D * b, P * D),
        "combine_rows": Floor((P + 2 * T) * D * b, 2 * (P + T) * D),
        "combine_rows_backward": Floor((P + 3 * T) * D * b, (P + 3 * T) * D),
        "dot_rows": Floor(2 * P * F * b, 2 * P * F),
        "embedding_gradient": Floor((T + V) * D * b, T * D),
    }


def copy_rate(seconds: float = 0.5) -> float:
    """Bytes read and written per second by a copy of 256 MiB on the CPU."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / min(seconds_of(lambda: target.copy_(source)) for _ in range(6))


class Inputs(NamedTuple):
    plan: Permutation
    x: Tensor
    rows: Tensor
    gates: Tensor
    grad: Tensor
    hidden: tuple[Tensor, Tensor]
    ids: Tensor


def inputs(sizes: Sizes, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    plan = plan_permutation(sizes.routing(), sizes.experts, sizes.experts + sizes.zero)
    gates = torch.rand(sizes.tokens, sizes.top_k, generator=generator)
    rows = draw(plan.token.shape[0], sizes.width)
    x, grad = (draw(sizes.tokens, sizes.width) for _ in range(2))
    hidden = draw(len(rows), sizes.expert_width), draw(len(rows), sizes.expert_width)
    return Inputs(plan, x, rows, gates, grad, hidden, sizes.ids())


def results(sizes: Sizes, held: Inputs) -> dict[str, Any]:
    """Operator → a call of it."""
    ops, plan = torch.ops.longcat, held.plan
    plan_tensors = plan.token, plan.selection, plan.row_index
    indices = sizes.routing()
    return {
        "plan": lambda: ops.plan(indices, sizes.experts, sizes.experts + sizes.zero),
        "gather_rows": lambda: ops.gather_rows(held.x, plan.token),
        "sum_rows": lambda: ops.sum_rows(held.rows, plan.row_index),
        "combine_rows": lambda: ops.combine_rows(held.rows, held.gates, plan.row_index, held.x),
        "combine_rows_backward": lambda: ops.combine_rows_backward(held.grad, held.gates, *plan_tensors, held.x),
        "dot_rows": lambda: ops.dot_rows(*held.hidden),
        "embedding_gradient": lambda: ops.embedding_gradient(held.grad, held.ids, sizes.vocabulary),
    }


def errors(sizes: Sizes, dtype: torch.dtype) -> dict[str, float]:
    """The largest error of each result against the same operator in float64, in ULP of the largest summand or sum.

    A sum that cancels has no small relative error in any arithmetic, so the unit is that of the largest number in the
    result's row or column of summands: for rows the larger of |exact| and the sum of |products|.
    """
    held = inputs(sizes, dtype)
    exact = held._replace(
        x=held.x.double(),
        rows=held.rows.double(),
        gates=held.gates.double(),
        grad=held.grad.double(),
        hidden=(held.hidden[0].double(), held.hidden[1].double()),
    )
    size = exact._replace(
        x=exact.x.abs(),
        rows=exact.rows.abs(),
        grad=exact.grad.abs(),
        hidden=(exact.hidden[0].abs(), exact.hidden[1].abs()),
    )
    found: dict[str, float] = {}
    calls, references, sizes_of = results(sizes, held), results(sizes, exact), results(sizes, size)
    for name in ("sum_rows", "combine_rows", "combine_rows_backward", "dot_rows", "embedding_gradient"):
        ours, wanted, scale = calls[name](), references[name](), sizes_of[name]()
        if isinstance(ours, Tensor):
            ours, wanted, scale = [ours], [wanted], [scale]
        labels = [name] if len(ours) == 1 else [f"{name}: {part}" for part in ("rows", "gates", "x")]
        for label, mine, exactly, summands in zip(labels, ours, wanted, scale, strict=True):
            unit = torch.exp2(torch.floor(torch.log2(summands.clamp_min(1e-30)))) * torch.finfo(mine.dtype).eps
            found[label] = float(((mine.double() - exactly).abs() / unit).max())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rate = copy_rate()
    rows = [
        [name, f"{floor.num_bytes / 1e6:.0f}", f"{floor.flops / 1e9:.2f}", f"{floor.num_bytes / H100 * 1e6:.0f}",
         f"{floor.num_bytes / rate * 1e3:.1f}"]
        for name, floor in floors(FLASH).items()
    ]  # fmt: skip
    columns = ["operator", "MB", "GFLOP", "µs, H100 at 3.35 TB/s", f"ms, this CPU's copy at {rate / 1e9:.1f} GB/s"]
    print_table("floors: one micro-batch of a flash layer, 4,096 tokens, bfloat16", columns, rows)
    measured: dict[str, dict[str, float]] = {}
    for dtype, size in ((torch.bfloat16, 2), (torch.float32, 4)):
        calls = results(SMALL, inputs(SMALL, dtype))
        times = {name: sorted(seconds_of(call) for _ in range(args.rounds + 1))[args.rounds // 2]
                 for name, call in calls.items()}  # fmt: skip
        measured[str(dtype)] = times
        rows = [
            [name, f"{took * 1e3:.2f}", f"{floors(SMALL, size)[name].num_bytes / rate * 1e3:.2f}"]
            for name, took in times.items()
        ]
        print_table(
            f"plain versions on this CPU, {dtype}, 2,048 tokens of width 512", ["operator", "ms", "floor, ms"], rows
        )
    shapes = {"512 wide": SMALL, "768 wide": Sizes(1024, 12, 64, 32, 768, 256, 4096, 8.0),
              "6144 wide": Sizes(128, 12, 512, 256, 6144, 2048, 1024, 8.0)}  # fmt: skip
    ulp = {
        f"{label}, {str(dtype).removeprefix('torch.')}": errors(sizes, dtype)
        for label, sizes in shapes.items()
        for dtype in (torch.float32, torch.bfloat16)
    }
    names = list(next(iter(ulp.values())))
    rows = [[name, *(f"{found[name]:.2f}" for found in ulp.values())] for name in names]
    print_table("largest error against float64, ULP of the sum of absolute summands", ["result", *ulp], rows)
    print_json("kernels", {"copy_bytes_per_second": rate, "seconds": measured, "ulp": ulp})


if __name__ == "__main__":
    main()
