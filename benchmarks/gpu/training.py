"""Training on one device: repeated runs have the same bits, losses are the CPU's, two ranks share a GPU; a profile."""

from __future__ import annotations

import torch

from benchmarks.gpu.part import Row, attempt
from benchmarks.gpu.session import scratch_corpus, train_steps

STEPS = 5
STEP = ["train.sequence_length=256", "train.global_batch_size=4", "train.micro_batch_size=2", "validation.every=0"]
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-3}  # of a loss beside the CPU's in float32


def models(device: torch.device) -> tuple[str, ...]:
    return ("tiny", "small") if device.type == "cuda" else ("debug",)


def repeated(device: str, overrides: list[str], model: str, dtype: str) -> list[Row]:
    """The same run twice, and once on the CPU in float32."""
    words = [*overrides, *STEP, f"model={model}", f"train.dtype={dtype}"]
    first, second = (train_steps(device, [*words, f"run.name={model}-{dtype}-{n}"], STEPS) for n in (1, 2))
    reference = train_steps("cpu", [*words, "train.dtype=float32", f"run.name={model}-{dtype}-cpu"], STEPS)
    away = max(abs(one / other - 1) for one, other in zip(first["loss"], reference["loss"], strict=True))
    same = all(first[key] == second[key] for key in ("loss", "grad_norm", "state_hash"))
    what = f"{model}, {dtype}, {STEPS} steps"
    return [
        Row(f"{what}: two runs", "same bits" if same else "other bits", "same bits", same),
        Row(f"{what}: losses beside the CPU's", f"{away:.1e}", f"{TOLERANCE[dtype]:.0e}", away <= TOLERANCE[dtype]),
    ]


def shared(device: str, overrides: list[str]) -> list[Row]:
    """Two ranks on one device over gloo, each with half of the batch, beside one rank."""
    words = [*overrides, *STEP, "model=debug", "train.dtype=float32"]
    alone = train_steps(device, [*words, "run.name=alone"], STEPS)
    both = train_steps(device, [*words, "parallel.dp=2", "run.name=both"], STEPS, ranks=2)
    away = max(abs(one / other - 1) for one, other in zip(both["loss"], alone["loss"], strict=True))
    limit = TOLERANCE["float32"]
    return [Row("debug: two gloo ranks on one device beside one", f"{away:.1e}", f"{limit:.0e}", away <= limit)]


def profiled(device: str, overrides: list[str], model: str) -> list[Row]:
    """The longest operators of a step."""
    words = [*overrides, *STEP, f"model={model}", "train.dtype=bfloat16", "run.name=profile"]
    found = train_steps(device, words, 2, profile=True)["operators"]
    return [Row(f"{model}, time of {name[:80]}", f"{share:.1%} in {count} calls") for name, share, count in found]


def run(device: torch.device) -> list[Row]:
    """All of it; each failure is a row."""
    rows = []
    with scratch_corpus() as (_, overrides):
        for model in models(device):
            for dtype in ("float32", "bfloat16") if device.type == "cuda" else ("float32",):
                rows += attempt(f"{model}, {dtype}", repeated, device.type, overrides, model, dtype)
        rows += attempt("two ranks on one device", shared, device.type, overrides)
        rows += attempt("profile", profiled, device.type, overrides, models(device)[-1])
    return rows
