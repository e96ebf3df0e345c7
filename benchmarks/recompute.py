"""Bytes that a layer keeps for its backward against FLOPs added, by preset of `parallel.recompute` and by value.

Traces one layer in bfloat16 without memory or values, so any size runs on any machine. A byte is kept if a storage
lives between forward and backward; FLOPs are those of matrix products and causal attention, forward and backward.

    python -m benchmarks.recompute --model flash --tokens 8192
"""

from __future__ import annotations

import argparse

from benchmarks.common import preset, print_json, print_table
from longcat.recompute_values import Value
from parallel.config import VALUES, ParallelConfig, Recompute
from parallel.plan.layer import layer_cost

COLUMNS = ["recomputed", "kept GB", "of none", "more FLOPs"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flash")
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    model = preset(options.model)
    configs = {str(one): ParallelConfig(recompute=one) for one in Recompute}
    for value in Value:
        configs[f"{value} alone"] = ParallelConfig(recompute=Recompute.selective, recompute_list=[value])
    narrower = [value for value in VALUES[Recompute.selective] if value != Value.ffn_up]
    configs["selective without ffn_up"] = ParallelConfig(recompute=Recompute.selective, recompute_list=narrower)
    costs = {name: layer_cost(model, config, options.tokens) for name, config in configs.items()}
    none = costs[Recompute.none]
    rows = [
        [
            name,
            f"{cost.kept_bytes / 1e9:.2f}",
            f"{cost.kept_bytes / none.kept_bytes:.1%}",
            f"{cost.flops / none.flops - 1:+.1%}",
        ]
        for name, cost in costs.items()
    ]
    title = f"One layer of {options.model}, {options.tokens} tokens: {none.flops / 1e12:.1f} TFLOP without"
    print_table(title, COLUMNS, rows)
    layers = {name: {"kept_bytes": cost.kept_bytes, "flops": cost.flops} for name, cost in costs.items()}
    print_json("recompute", {"model": options.model, "tokens": options.tokens, "layers": layers})


if __name__ == "__main__":
    main()
