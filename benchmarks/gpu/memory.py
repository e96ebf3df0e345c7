"""Peak memory of a step beside the planner's: traced tensors, and what the allocator gave out."""

from __future__ import annotations

import torch

from benchmarks.gpu.part import Row, attempt
from benchmarks.gpu.session import scratch_corpus, train_steps
from benchmarks.gpu.training import STEP, models
from launch.plan.trace import Scope, trace
from train.api import compose

RANGE = (0.95, 1.25)  # the allocator's peak over the planned one: it rounds each tensor up to 512 bytes


def peak(device: torch.device, overrides: list[str], model: str) -> list[Row]:
    """The planned peak, and on a GPU the measured one."""
    words = [*overrides, *STEP, f"model={model}", "train.dtype=bfloat16", "sdc.every=0", f"run.name={model}"]
    planned = trace(compose(*words), 1, Scope(on_gpu=device.type == "cuda")).peak
    rows = [Row(f"{model}: planned peak", f"{planned / 2**20:.0f} MiB")]
    if device.type == "cuda":
        found = train_steps("cuda", words, 3)["peak"]
        wanted = f"{RANGE[0]:g} to {RANGE[1]:g} of it"
        rows.append(
            Row(f"{model}: allocated", f"{found / 2**20:.0f} MiB", wanted, RANGE[0] <= found / planned <= RANGE[1])
        )
    return rows


def run(device: torch.device) -> list[Row]:
    """Each model."""
    rows = []
    with scratch_corpus() as (_, overrides):
        for model in models(device):
            rows += attempt(model, peak, device, overrides, model)
    return rows
