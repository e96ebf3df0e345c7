"""A run folder made up for tests: plausible curves, routing and text without any training."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

SOURCE = '''
def greatest_common_divisor(first: int, second: int) -> int:
    """Return the greatest common divisor of two integers."""
    while second:
        first, second = second, first % second
    return abs(first)


class Polynomial:
    def __init__(self, coefficients):
        self.coefficients = list(coefficients)

    def __call__(self, x):
        value = 0
        for coefficient in reversed(self.coefficients):
            value = value * x + coefficient
        return value

    def derivative(self):
        if len(self.coefficients) <= 1 and self.coefficients is not None:
            return Polynomial([0])
        return Polynomial([i * c for i, c in enumerate(self.coefficients)][1:])
'''


def fabricate(
    folder: Path,
    steps: int = 1200,
    layers: int = 4,
    experts: int = 16,
    zero_experts: int = 8,
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    routing_rows: int = 120,
    extras: bool = True,
    floor: float = 1.85,
) -> Path:
    """Write a complete run folder and return it; `extras` adds baselines.json and text.json."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    (folder / "config.yaml").write_text(_config(folder.name, steps, layers, experts, zero_experts, settings or {}))
    with (folder / "metrics.jsonl").open("w") as file:
        for row in _metrics(steps, layers, draw, floor):
            file.write(json.dumps(row) + "\n")
    if routing_rows:
        with (folder / "routing.jsonl").open("w") as file:
            for row in _routing(steps, routing_rows, layers, experts, zero_experts, draw):
                file.write(json.dumps(row) + "\n")
    if extras:
        baselines = {"unigram": 5.71, "bigram": 3.62, "trigram": 2.74, "train_tokens": 40_000_000}
        (folder / "baselines.json").write_text(json.dumps(baselines))
        (folder / "text.json").write_text(json.dumps({"documents": _documents(draw)}))
    return folder


def _config(name: str, steps: int, layers: int, experts: int, zero: int, settings: dict[str, Any]) -> str:
    model = {
        "name": "tiny",
        "vocab_size": 4096,
        "num_layers": layers,
        "hidden_size": 256,
        "num_experts": experts,
    }
    model |= {"num_zero_experts": zero, "top_k": 6, "expected_ffn_experts": 4, "rope_theta": 1e6}
    config: dict[str, Any] = {
        "model": model,
        "train": {
            "steps": steps,
            "seed": 0,
            "sequence_length": 512,
            "global_batch_size": 16,
            "dtype": "float32",
        },
        "optim": {"lr": 3e-3, "betas": [0.9, 0.95], "eps": 1e-16, "grad_clip": 1.0},
        "balance": {"method": "pid", "ki": 0.01},
        "parallel": {"pp": 1, "fsdp": 2, "ep": 2},
        "run": {"name": name, "dir": f"runs/{name}"},
        "environment": {
            "git_commit": "0123abcd",
            "packages": {"torch": "2.13.0", "numpy": "2.3.1"},
            "device": "CPU (16 cores)",
            "world_size": 2,
        },
        "derived": {
            "parameters": 18_364_928,
            "active_parameters": [7_100_000, 9_450_000, 10_600_000],
            "flops_per_token": 5.7e7,
            "peak_gflops_per_rank": 140.0,
        },
    }
    for dotted, value in settings.items():
        group, key = dotted.split(".")
        config.setdefault(group, {})[key] = value
    return json.dumps(config, indent=1)  # JSON is YAML


def _metrics(steps: int, layers: int, draw: np.random.Generator, floor: float) -> list[dict[str, Any]]:
    rows = []
    for step in range(1, steps + 1):
        share = step / steps
        loss = floor + 6.4 * math.exp(-step / (0.02 * steps + 5)) + 1.1 * math.exp(-3 * share) * (1 - share / 4)
        loss += draw.normal(0, 0.05)
        seconds = 0.62 * (1 + abs(draw.normal(0, 0.03)) + 1.5 * (draw.random() < 0.004)) + 2.0 * (step == 1)
        row = {
            "step": step,
            "first_sample": (step - 1) * 16,
            "tokens": step * 8192,
            "loss": loss,
            "loss_mtp": loss + 0.35 + draw.normal(0, 0.03) if share > 0.25 else None,
            "loss_balance": 2e-4 * (1 + math.exp(-8 * share)) * math.exp(draw.normal(0, 0.05)),
            "loss_z": 6e-6 * (1 + 2 * share),
            "grad_norm": (0.3 + 3 * math.exp(-20 * share)) * math.exp(draw.normal(0, 0.2)),
            "lr": 3e-3 * min(1, step / (0.03 * steps + 1)) * min(1, max(0.02, (1 - share) / 0.2)),
            "step_seconds": seconds,
            "tokens_per_second": 8192 / seconds,
            "flops": 8192 * 5.7e7,
            "mfu": 8192 * 5.7e7 / seconds / 2.8e11 * 0.1,
            "ffn_experts_per_token": 4 + 0.62 * math.exp(-9 * share) * math.cos(14 * share) + draw.normal(0, 0.012),
            "expert_load_max_over_mean": 1.18 + 2.6 * math.exp(-14 * share) + abs(draw.normal(0, 0.05)),
            "bias_range": 0.06 * (1 - math.exp(-5 * share)),
            "router_similarity": 0.02 + 0.05 * share + draw.normal(0, 0.002),
            "router_grad_ratio": (0.03 + 0.2 * math.exp(-12 * share)) * math.exp(draw.normal(0, 0.2)),
            "hidden_norm": 16 + 120 * share**0.5 + draw.normal(0, 1),
            "exposed_comm_share": 0.09 + abs(draw.normal(0, 0.01)),
            "memory_gib": 1.42 + 0.01 * (step > 5),
        }
        if step % 5 == 0 or step == 1:
            norms = row["grad_norm"] * np.exp(draw.normal(0, 0.1, layers + 3)) / np.sqrt(np.arange(layers + 3) + 2)
            names = (*(f"layer_{layer}" for layer in range(layers)), "embedding", "head", "mtp")
            row |= {f"grad_norm/{name}": float(norm) for name, norm in zip(names, norms, strict=True)}
            row |= {} if share > 0.25 else {"grad_norm/mtp": None}
        if step % max(1, steps // 24) == 0:
            row |= {"val_loss": loss + 0.06, "val_bits_per_byte": (loss + 0.06) / 2.47}
        rows.append(row)
    return rows


def _routing(
    steps: int, rows: int, layers: int, experts: int, zero: int, draw: np.random.Generator
) -> list[dict[str, Any]]:
    taste = draw.normal(0, 0.8, (layers, experts + zero))
    target = draw.normal(0, 0.012, (layers, experts))
    out = []
    for step in np.unique(np.linspace(1, steps, rows).astype(int)):
        share = step / steps
        weights = np.exp(taste * (0.12 + math.exp(-10 * share)) + draw.normal(0, 0.05, taste.shape))
        weights[:, :experts] *= 4 / weights[:, :experts].sum(1, keepdims=True)
        if zero:
            weights[:, experts:] *= (2 - math.exp(-9 * share)) / weights[:, experts:].sum(1, keepdims=True)
        counts = (8192 * weights).astype(int)
        bias = np.zeros((layers, experts + zero))
        bias[:, :experts] = target * (1 - math.exp(-5 * share)) + draw.normal(0, 2e-4, target.shape)
        out.append({"step": int(step), "counts": counts.tolist(), "bias": bias.tolist()})
    return out


def _documents(draw: np.random.Generator) -> list[dict[str, Any]]:
    documents = []
    for text in (SOURCE.strip("\n") + "\n", 'html = "<b>&amp;</b>"\nprint(html if a < b else "</pre>")\n'):
        pieces = re.findall(r" ?\w{1,7}|\n+|[ \t]+|[^\w\s]", text)
        counts = [float(np.clip(_appetite(piece) + draw.normal(0, 0.35), 0, 6)) for piece in pieces]
        documents.append({"pieces": pieces, "ffn_experts": counts})
    return documents


def _appetite(piece: str) -> float:
    if not piece.strip():
        return 2.6
    return 3.2 if not piece.strip().isalnum() else 4.0 + 0.18 * len(piece.strip())
