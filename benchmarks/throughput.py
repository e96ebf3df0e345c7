"""Training throughput of this model and of transformers' LongCat-Flash: same sizes, values, dtype and batch.

Forward and backward with cross-entropy, in alternating rounds in one process, without MTP. The peer gets the faster of
its attention implementations; its experts have only one, a loop over those with tokens (its class does not support
the package's grouped or batched GEMMs).

    python -m benchmarks.throughput --model small --dtype float32 --batch 4 --length 512
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import (
    Rounds,
    alternate,
    device,
    gemm_gflops,
    pairwise_ratios,
    preset,
    print_json,
    print_table,
    seconds_of,
)
from benchmarks.peer import copy_to_peer, peer_model
from longcat.config import ModelConfig
from longcat.counts import flops_per_token
from longcat.init import initialise
from longcat.model import LongCat
from longcat.ops.fusion import fuse
from longcat.ops.matmul import cpu_multiplies_bfloat16
from parallel.device import keep_freed_memory
from parallel.kernels import install

# Largest relative difference of the two losses that still counts as the same computation
LOSS_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-3}
PEER_ATTENTION = ("sdpa", "eager")


class Batch:
    """Tokens and labels [B, S], drawn anew for each round: training sees no batch twice.

    It matters: CPU libraries compile code for each number of rows that an expert gets.
    """

    tokens: Tensor
    labels: Tensor

    def __init__(self, config: ModelConfig, size: int, length: int) -> None:
        self.vocab_size, self.shape = config.vocab_size, (size, length + 1)
        self.generator = torch.Generator().manual_seed(0)
        self.draw()

    def draw(self) -> None:
        sample = torch.randint(self.vocab_size, self.shape, generator=self.generator).to(device())
        self.tokens, self.labels = sample[:, :-1].contiguous(), sample[:, 1:].contiguous()

    @property
    def num_tokens(self) -> int:
        return self.tokens.numel()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small", help="a preset of configs/model")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--batch", type=int, help="sequences (default: 4, or 1 without bfloat16 instructions)")
    parser.add_argument("--length", type=int, help="tokens per sequence (default: 512, or 128 without them)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=N", help="fields of the model, as num_layers=2")
    parser.add_argument("--no-compile", action="store_true", help="as parallel.compile=false: no fused operators")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 5, or 3 without them)")
    return parser.parse_args()


def our_step(model: LongCat, batch: Batch) -> Callable[[], float]:
    """Forward and backward of our model; gives the mean loss."""

    def step() -> float:
        valid = torch.ones_like(batch.labels, dtype=torch.bool)
        loss = model(batch.tokens, batch.labels, valid, mtp=False).lm / batch.num_tokens
        loss.backward()
        model.zero_grad(set_to_none=True)  # between steps neither program holds gradients
        return loss.item()

    return step


def peer_step(peer: Any, batch: Batch) -> Callable[[], float]:
    """Forward and backward of the peer, with float32 cross-entropy as in its own loss function."""

    def step() -> float:
        logits = peer(input_ids=batch.tokens).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch.labels.flatten())
        loss.backward()
        peer.zero_grad(set_to_none=True)
        return float(loss.item())

    return step


def fastest_attention(peer: Any, step: Callable[[], float]) -> str:
    """Set the peer to the attention implementation that is fastest in one run; returns its name."""
    times = {}
    for name in PEER_ATTENTION:
        peer.set_attn_implementation(name)
        times[name] = seconds_of(step)
    best = min(times, key=lambda name: times[name])
    peer.set_attn_implementation(best)
    return best


def compare(config: ModelConfig, dtype: torch.dtype, batch: Batch, rounds: int) -> dict[str, Any]:
    """Build both models with equal values, check that they compute the same, and time them in turns."""
    model = LongCat(config)
    initialise(model, config, seed=0)
    peer = peer_model(config, PEER_ATTENTION[0])
    copy_to_peer(model, peer, config)
    model, peer = model.to(device(), dtype), peer.to(device(), dtype).train()
    ours, theirs = our_step(model, batch), peer_step(peer, batch)
    losses = ours(), theirs()  # also warms up
    difference = abs(losses[0] / losses[1] - 1)
    if not difference <= LOSS_TOLERANCE[dtype]:
        raise SystemExit(f"the losses {losses[0]} and {losses[1]} differ by {difference:.1e}: no comparison")
    attention = fastest_attention(peer, theirs)
    with torch.no_grad():
        valid = torch.ones_like(batch.labels, dtype=torch.bool)
        used = model(batch.tokens, batch.labels, valid, mtp=False).ffn_experts.float().mean().item()
    flops = flops_per_token(config, batch.tokens.shape[1], used) * batch.num_tokens
    rates = {"float32": 0.0, "bfloat16": 0.0}

    def between_rounds() -> None:
        batch.draw()
        # The best rate: a busy machine must not flatter us.
        for name in rates:
            rates[name] = max(rates[name], gemm_gflops(getattr(torch, name), budget_seconds=0.3))

    timed = alternate({"longcat": ours, "transformers": theirs}, rounds, between=between_rounds)
    ratios = pairwise_ratios(timed["transformers"], timed["longcat"])
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "batch": list(batch.tokens.shape),
        "peer_attention": attention,
        "loss_difference": difference,
        "ffn_experts_per_token": used,
        "gemm_gflops": rates,
        "speedup_median": statistics.median(ratios),
        "speedup_range": [ratios[0], ratios[-1]],
        **{name: describe(one, batch.num_tokens, flops, rates) for name, one in timed.items()},
    }


def describe(timed: Rounds, num_tokens: int, flops: float, rates: dict[str, float]) -> dict[str, Any]:
    """One program's row: speed, and its model FLOP/s over each dtype's GEMM rate."""
    gflops = flops / timed.median / 1e9
    return {
        "tokens_per_second": num_tokens / timed.median,
        "model_gflops": gflops,
        "mfu": {dtype: gflops / rate for dtype, rate in rates.items()},
        "peak_extra_gib": timed.peak_gib,
        "seconds": timed.seconds,
    }


def show(result: dict[str, Any], name: str, config: ModelConfig) -> None:
    """The table of one dtype."""
    rates = result["gemm_gflops"]
    rows = []
    for program in ("longcat", "transformers"):
        one = result[program]
        peak = one["peak_extra_gib"]
        rows.append(
            [
                program if program == "longcat" else f"transformers ({result['peer_attention']})",
                f"{one['tokens_per_second']:.0f}",
                f"{one['model_gflops']:.1f}",
                f"{one['mfu']['float32']:.1%}",
                f"{one['mfu']['bfloat16']:.1%}",
                "-" if peak is None else f"{peak:.2f}",
            ]
        )
    sequences, length = result["batch"]
    low, high = result["speedup_range"]
    columns = ["program", "tokens/s", "GFLOP/s", "of float32 GEMM", "of bfloat16 GEMM", "memory GiB"]
    print_table(f"{name}, {result['dtype']}, {sequences} x {length} tokens, forward and backward", columns, rows)
    print(
        f"speed-up {result['speedup_median']:.2f} (rounds {low:.2f} to {high:.2f}); GEMM GFLOP/s: "
        f"float32 {rates['float32']:.0f}, bfloat16 {rates['bfloat16']:.0f}; losses differ by "
        f"{result['loss_difference']:.1e}; {result['ffn_experts_per_token']:.2f} of {config.top_k} chosen "
        f"experts are FFN experts"
    )


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as in training; applies to all programs of this process
    install(device())
    fields = {name: int(value) for name, value in (one.split("=") for one in args.set)}
    config = replace(preset(args.model), num_mtp_layers=0, **fields)
    config.validate()
    fuse(not args.no_compile)
    results = []
    for name in args.dtype:
        dtype = getattr(torch, name)
        slow = dtype is torch.bfloat16 and device().type == "cpu" and not cpu_multiplies_bfloat16()
        batch = Batch(config, args.batch or (1 if slow else 4), args.length or (128 if slow else 512))
        results.append(compare(config, dtype, batch, args.rounds or (3 if slow else 5)))
        show(results[-1], args.model, config)
    print_json("throughput", {"model": args.model, "set": fields, "fused": not args.no_compile, "results": results})


if __name__ == "__main__":
    main()
