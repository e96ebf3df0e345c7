"""One MoE layer, forward and backward, against torchtitan's and DeepSpeed's: same shapes, values, tokens and process.

Without identity experts all compute the same: outputs (with torchtitan also gradients) are compared before timing;
benchmarks/moe_peers.py lists the differences. One more row is our layer as trained, with identity experts and the same
FFN experts per token on average. Tokens are new in each round, as in training. Programs run in turn, eager and compiled
(ours: `parallel.compile`), and a ratio is to the faster program of the peer.

torchtitan 0.3.0 requires an older `datasets` than this project, so it goes into a folder outside the environment:

    pip install --no-deps --target /tmp/titan torchtitan==0.3.0 spmd_types==0.2.3 tyro docstring-parser typeguard
    PYTHONPATH=/tmp/titan python -m benchmarks.moe_layer --model small proxy_768 --threads 2

Without it, its rows are left out. The floor is the time of the GEMMs alone at the measured GEMM rates.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import Rounds, alternate, device, gemm_gflops, pairwise_ratios, preset, print_json, print_table
from benchmarks.moe_peers import deepspeed_layer, torchtitan_layer
from longcat.config import ModelConfig
from longcat.init import fill
from longcat.moe import MoE
from longcat.names import stored_state
from longcat.ops.fusion import fuse
from parallel.device import keep_freed_memory
from parallel.kernels import install

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}  # of ‖difference‖ / ‖value‖ between two programs
MOST_COMPILED = 32  # experts: DeepSpeed's are modules, which the compiler unrolls


class Tokens:
    """Inputs [T, D] and the gradients of the outputs, drawn anew for each round."""

    x: Tensor
    grad: Tensor

    def __init__(self, num: int, width: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype = (num, width), dtype
        self.generator = torch.Generator().manual_seed(0)
        self.draw()

    def draw(self) -> None:
        x, grad = (torch.randn(self.shape, generator=self.generator).to(device(), self.dtype) for _ in range(2))
        self.x, self.grad = x.requires_grad_(), grad


@dataclass
class Program:
    """A layer and its forward."""

    layer: nn.Module
    forward: Callable[[Tensor], Tensor]  # [T, D] → [T, D]
    tokens: Tokens
    fused: bool = False

    def __call__(self) -> Tensor:
        """Forward and backward; between calls no program holds gradients of weights."""
        fuse(self.fused)
        self.tokens.x.grad = None
        out = self.forward(self.tokens.x)
        out.backward(self.tokens.grad)
        self.layer.zero_grad(set_to_none=True)
        return out.detach()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["small"], help="presets of configs/model")
    parser.add_argument(
        "--experts", type=int, help="FFN experts in place of the presets' (identity ones in proportion)"
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of torch")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out the compiled programs, which are slow to build"
    )
    return parser.parse_args()


def our_layer(config: ModelConfig, dtype: torch.dtype) -> MoE:
    moe = MoE(config, 1)
    for name, tensor in stored_state(moe):
        fill(tensor.detach(), f"layers.0.mlp.{name}", tuple(tensor.shape), None, config, seed=0)
    bias = moe.router.e_score_correction_bias
    moe.to(device(), dtype).router.e_score_correction_bias = bias.to(device())
    return moe


def our_forward(moe: MoE) -> Callable[[Tensor], Tensor]:
    return lambda x: moe.combine(moe.compute(moe.dispatch(x)))[0]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def agreement(ours: MoE, titan: Any, speed: Any, tokens: Tokens) -> dict[str, float]:
    """‖difference‖ / ‖ours‖ of the peers' results; exits where one exceeds rounding."""
    x, grad = tokens.x, tokens.grad
    out = our_forward(ours)(x)
    weights = [ours.router.classifier.weight, ours.experts.gate_up, ours.experts.down]
    mine = torch.autograd.grad(out, [x, *weights], grad)
    found = {}
    if titan is not None:
        theirs = titan(x[None])[0]
        experts = titan.routed_experts.inner_experts
        named = [x, titan.router.gate.weight, experts.w1_EFD, experts.w3_EFD, experts.w2_EDF]
        d_x, d_router, d_gate, d_up, d_down = torch.autograd.grad(theirs, named, grad)
        found["torchtitan output"] = relative(theirs.detach(), out.detach())
        for name, a, b in zip(
            ("input", "router", "gate and up", "down"),
            (d_x, d_router, torch.cat((d_gate, d_up), 1), d_down),
            mine,
            strict=True,
        ):
            found[f"torchtitan gradient of {name}"] = relative(a, b)
    with torch.no_grad():
        gates = ours.router(x)[2].sum(1, keepdim=True)
        found["DeepSpeed output, times our gates' sum"] = relative(speed(x)[0].float() * gates, out.float())
    wrong = {name: value for name, value in found.items() if not value <= TOLERANCE[tokens.dtype]}
    if wrong:
        raise SystemExit(f"results differ, so no comparison: {wrong}")
    return found


def programs_of(config: ModelConfig, trained: ModelConfig, tokens: Tokens, compiled: bool) -> tuple[dict, dict]:
    """The programs by name, and the relative differences of the peers' results."""
    ours, whole = our_layer(config, tokens.dtype), our_layer(trained, tokens.dtype)
    try:
        titan: Any = torchtitan_layer(config, ours)
    except ImportError as error:
        print(f"torchtitan is left out ({error}); see the docstring of this file for how to install it")
        titan = None
    speed, dropping = deepspeed_layer(config, ours, None), deepspeed_layer(config, ours, 1.0)
    found = agreement(ours, titan, speed, tokens)
    made = {"longcat": Program(ours, our_forward(ours), tokens)}
    if compiled:
        made["longcat compiled"] = replace(made["longcat"], fused=True)
    if titan is not None:
        made["torchtitan"] = Program(titan, lambda x: titan(x[None])[0], tokens)
        if compiled:
            fast = torch.compile(titan, dynamic=True)
            made["torchtitan compiled"] = Program(titan, lambda x: fast(x[None])[0], tokens)
    made["DeepSpeed"] = Program(speed, lambda x: speed(x)[0], tokens)
    if compiled and config.num_experts <= MOST_COMPILED:
        quick = torch.compile(speed, dynamic=True)
        made["DeepSpeed compiled"] = Program(speed, lambda x: quick(x)[0], tokens)
    made["DeepSpeed, drops tokens"] = Program(dropping, lambda x: dropping(x)[0], tokens)
    made["longcat, identity experts"] = Program(whole, our_forward(whole), tokens, fused=compiled)
    return made, found


def compare(name: str, args: argparse.Namespace) -> dict[str, Any]:
    trained = preset(name)
    if args.experts:
        identity = trained.num_zero_experts * args.experts // trained.num_experts
        trained = replace(trained, num_experts=args.experts, num_zero_experts=identity)
    chosen = int(trained.expected_ffn_experts)
    config = replace(trained, num_zero_experts=0, top_k=chosen, expected_ffn_experts=chosen)
    for one in (trained, config):
        one.validate()
    dtype = getattr(torch, args.dtype)
    tokens = Tokens(args.tokens, config.hidden_size, dtype)
    made, found = programs_of(config, trained, tokens, not args.no_compile)
    for _ in range(3):  # the compiler recompiles at the second shape
        for program in made.values():
            program()
        tokens.draw()
    rates = {torch.float32: 0.0, dtype: 0.0}

    def between_rounds() -> None:
        tokens.draw()
        for kind in rates:  # the best rate: a busy machine must not flatter us
            rates[kind] = max(rates[kind], gemm_gflops(kind, budget_seconds=0.1))

    timed = alternate(made, args.rounds, between=between_rounds)
    width, hidden, num = config.hidden_size, config.expert_hidden_size, config.num_experts
    experts, router = 18 * args.tokens * chosen * width * hidden / 1e9, 6 * args.tokens * width * num / 1e9
    floor = experts / rates[dtype] + router / rates[torch.float32]
    ours = min((timed[one] for one in ("longcat", "longcat compiled") if one in timed), key=lambda one: one.median)
    return {
        "model": name,
        "shape": f"T={args.tokens} D={width} F={hidden} N={num} K={chosen}",
        "differences": found,
        "gflop": {"experts": experts, "router": router},
        "gemm_gflops": {str(kind).removeprefix("torch."): rate for kind, rate in rates.items()},
        "floor_seconds": floor,
        "speedup": {peer: speedup(ours, timed, peer) for peer in ("torchtitan", "DeepSpeed") if peer in timed},
        "programs": {one: describe(rounds, experts + router, floor) for one, rounds in timed.items()},
    }


def speedup(ours: Rounds, timed: dict[str, Rounds], peer: str) -> dict[str, Any]:
    """Speed-up over the peer's faster program: median, and range over the rounds."""
    best = min((name for name in (peer, f"{peer} compiled") if name in timed), key=lambda name: timed[name].median)
    ratios = pairwise_ratios(timed[best], ours)
    return {"beside": best, "median": statistics.median(ratios), "range": [ratios[0], ratios[-1]]}


def describe(rounds: Rounds, gflop: float, floor: float) -> dict[str, Any]:
    return {
        "median_ms": rounds.median * 1e3,
        "range_ms": [min(rounds.seconds) * 1e3, max(rounds.seconds) * 1e3],
        "gflops": gflop / rounds.median,
        "of_floor": floor / rounds.median,
        "peak_extra_gib": rounds.peak_gib,
    }


def show(result: dict[str, Any], args: argparse.Namespace) -> None:
    rows = [
        [
            name,
            f"{one['median_ms']:.1f}",
            "{:.1f} to {:.1f}".format(*one["range_ms"]),
            f"{one['gflops']:.0f}",
            f"{one['of_floor']:.0%}",
            "-" if one["peak_extra_gib"] is None else f"{one['peak_extra_gib']:.2f}",
        ]
        for name, one in result["programs"].items()
    ]
    columns = ["program", "ms", "rounds", "GFLOP/s", "floor / time", "memory GiB"]
    print_table(f"{result['model']}: {result['shape']}, {args.dtype}, forward and backward", columns, rows)
    rates = ", ".join(f"{name} {rate:.0f}" for name, rate in result["gemm_gflops"].items())
    print(
        f"floor {result['floor_seconds'] * 1e3:.1f} ms: {result['gflop']['experts']:.1f} GFLOP of experts and "
        f"{result['gflop']['router']:.2f} of the router (float32) at the GEMM GFLOP/s {rates}"
    )
    for name, one in result["speedup"].items():
        low, high = one["range"]
        print(f"{one['median']:.2f} times as fast as {name} (rounds {low:.2f} to {high:.2f}; against {one['beside']})")
    print("differences: " + "; ".join(f"{name} {value:.1e}" for name, value in result["differences"].items()))


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    keep_freed_memory()  # as in training; applies to all programs of this process
    install(device())
    results = []
    for name in args.model:
        results.append(compare(name, args))
        show(results[-1], args)
    print_json("moe_layer", {"tokens": args.tokens, "dtype": args.dtype, "experts": args.experts, "results": results})


if __name__ == "__main__":
    main()
