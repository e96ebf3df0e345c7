"""Times of the Triton kernels on a GPU beside the floor that its memory sets, and beside torch's own operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.one_pass import calls
from benchmarks.gpu.part import Row, attempt, need_gpu
from benchmarks.kernels import FLASH, Sizes, floors
from longcat.ops.permute import plan_permutation
from parallel.kernels import install

SLOWEST = 10  # times its floor; the plan's kernels wait for their starts, so it is held to nothing


def milliseconds(program: Callable[[], Any], rounds: int = 20) -> float:
    """The median time of a call on the GPU, after three to warm up."""
    for _ in range(3):
        program()
    times = []
    for _ in range(rounds):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        program()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[rounds // 2]


def programs(sizes: Sizes) -> dict[str, tuple[Callable[[], Any], Callable[[], Any] | None]]:
    """Operator → (ours, torch's own that does the same or its main part), bfloat16 at ``sizes``."""
    ops, device = torch.ops.longcat, "cuda"
    indices = sizes.routing().to(device)
    plan = plan_permutation(indices, sizes.experts, sizes.experts + sizes.zero)
    num_rows = plan.token.shape[0]
    x, grad = (torch.randn(sizes.tokens, sizes.width, device=device).bfloat16() for _ in range(2))
    rows = torch.randn(num_rows, sizes.width, device=device).bfloat16()
    hidden = [torch.randn(num_rows, sizes.expert_width, device=device).bfloat16() for _ in range(2)]
    gates = torch.rand(sizes.tokens, sizes.top_k, device=device)
    ids = sizes.ids().to(device)
    sums = torch.zeros_like(x)
    plan_tensors = plan.token, plan.selection, plan.row_index
    backward = torch.ops.aten.embedding_dense_backward
    return {
        "plan": (lambda: ops.plan(indices, sizes.experts, sizes.experts + sizes.zero), None),
        "gather_rows": (lambda: ops.gather_rows(x, plan.token), lambda: x.index_select(0, plan.token)),
        "sum_rows": (lambda: ops.sum_rows(rows, plan.row_index), lambda: sums.index_add_(0, plan.token, rows)),
        "combine_rows": (lambda: ops.combine_rows(rows, gates, plan.row_index, x), None),
        "combine_rows_backward": (lambda: ops.combine_rows_backward(grad, gates, *plan_tensors, x), None),
        "dot_rows": (lambda: ops.dot_rows(*hidden), None),
        "embedding_gradient": (
            lambda: ops.embedding_gradient(grad, ids, sizes.vocabulary),
            lambda: backward(grad, ids, sizes.vocabulary, -1, False),
        ),
    }


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.ones(1 << 28, device=device)
    target = torch.empty_like(source)
    return 2 * 4 * source.numel() / milliseconds(lambda: target.copy_(source)) * 1e3


def beside_floor(name: str, ours: Callable[[], Any], theirs: Callable[[], Any] | None, floor: float) -> list[Row]:
    """An operator's time beside its floor, in milliseconds, and torch's."""
    took = milliseconds(ours)
    beside = "" if theirs is None else f"; torch {milliseconds(theirs) * 1e3:.0f} µs"
    met = None if name == "plan" else took <= SLOWEST * floor
    return [Row(name, f"{took * 1e3:.0f} µs{beside}", f"under {SLOWEST} times {floor * 1e3:.0f} µs", met)]


def run(device: torch.device) -> list[Row]:
    """Each operator at the sizes of a flash layer."""
    need_gpu(device)
    if not install(device):
        return [Row("Triton kernels", "not installed", "installed", False)]
    rate = copy_rate(device)
    rows = [Row("copy of 1 GiB", f"{rate / 1e12:.2f} TB/s")]
    for name, (ours, theirs) in programs(FLASH).items():
        rows += attempt(name, beside_floor, name, ours, theirs, floors(FLASH)[name].num_bytes / rate * 1e3)
    for name, (ours, theirs, num_bytes) in calls(device).items():
        rows += attempt(name, beside_floor, name, ours, theirs, num_bytes / rate * 1e3)
    return rows
