"""Throughput beside other programs, by the benchmarks that compare them: transformers, torchtitan's MoE layer."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch

from benchmarks.gpu.part import Row, attempt, need_gpu
from benchmarks.gpu.session import ROOT


def benchmark(name: str, *arguments: str) -> dict[str, Any]:
    """The line of JSON that a benchmark prints."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    return dict(json.loads(lines[-1]))


def whole_model() -> list[Row]:
    """Forward and backward of `small` in bfloat16."""
    size = ["--model", "small", "--dtype", "bfloat16", "--batch", "8", "--length", "1024", "--rounds", "3"]
    (found,) = benchmark("throughput", *size, "--no-compile")["results"]
    rows = [
        Row(f"small: {name}", f"{found[name]['tokens_per_second']:.0f} tokens/s")
        for name in ("longcat", "transformers")
    ]
    return [*rows, Row("small: over transformers", f"{found['speedup_median']:.2f}")]


def moe_layer() -> list[Row]:
    """One MoE layer of `proxy_768`; torchtitan's only where it is installed."""
    found = benchmark("moe_layer", "--model", "proxy_768", "--tokens", "8192", "--rounds", "5", "--no-compile")
    (result,) = found["results"]
    rows = [Row(f"MoE layer: {name}", f"{one['median_ms']:.2f} ms") for name, one in result["programs"].items()]
    rows += [Row(f"MoE layer: over {peer}", f"{one['median']:.2f}") for peer, one in result["speedup"].items()]
    return rows if "torchtitan" in result["speedup"] else [*rows, Row("MoE layer: over torchtitan", "not installed")]


def run(device: torch.device) -> list[Row]:
    """Both."""
    need_gpu(device)
    return [*attempt("small beside transformers", whole_model), *attempt("MoE layer", moe_layer)]
