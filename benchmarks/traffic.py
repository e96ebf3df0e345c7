"""Bytes that elementwise operators of a layer move on a GPU, forward and backward, counted without one.

Runs one layer in bfloat16 on the meta device, with the operators of `longcat/ops/one_pass.py` and with the expressions
that a CPU runs instead of them. Counted are the bytes of the tensors that each operator reads and writes; matrix
products, attention and views are left out. An operator of this project counts as its one kernel.

    python -m benchmarks.traffic --model flash --tokens 8192
"""

from __future__ import annotations

import argparse
from collections import Counter
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.common import preset, print_json, print_table
from longcat.config import ModelConfig
from longcat.dispatch import LocalDispatcher, LocalPending, Routing
from longcat.layer import ShortcutLayer
from longcat.ops import fusion
from longcat.ops.torch_internals import TorchDispatchMode, operator_name, tree_leaves
from parallel.kernels.shapes import shapes_on_meta

COLUMNS = ["operator", "calls", "GB"]
PRODUCTS = ("mm", "addmm", "bmm", "_grouped_mm", "grouped_rows", "grouped_sums")
ATTENTION = ("_flash_attention_forward", "_flash_attention_backward")
ONLY_WRITTEN = ("copy_", "fill_", "zero_")  # their first argument is not read


def nbytes(x: Tensor) -> int:
    """Bytes of a tensor; a dimension that is expanded counts once."""
    count = x.element_size()
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride or not size else 1
    return count


def is_view(func: Any) -> bool:
    """Whether an operator only returns another view of its argument."""
    aliases = [one.alias_info for one in func._schema.returns]
    return any(one is not None and not one.is_write for one in aliases)


class Traffic(TorchDispatchMode):
    """Adds up the bytes of elementwise operators, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = operator_name(func)
        if name in PRODUCTS or name in ATTENTION or is_view(func) or "empty" in name:
            return out
        read = {id(x): x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for unread in (kwargs.get("out"), args[0] if name in ONLY_WRITTEN else None):
            read.pop(id(unread), None)
        written = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        self.bytes[name] += sum(map(nbytes, [*read.values(), *written]))
        self.calls[name] += 1
        return out


def layer_traffic(config: ModelConfig, tokens: int, one_pass: bool) -> dict[str, Traffic]:
    """The traffic of one layer's forward and backward for one sequence of ``tokens``, on a GPU like an H100.

    With ``one_pass``, norms, SwiGLU and rotation are operators of their own.
    """
    found = {"forward": Traffic(), "backward": Traffic()}
    rows_of_token = config.expected_ffn_experts

    def start_dispatch(_: LocalDispatcher, chunks: list[tuple[Tensor, Routing]]) -> list[LocalPending]:
        return [LocalPending(x, routing, partial(round, x.shape[0] * rows_of_token)) for x, routing in chunks]

    with ExitStack() as stack:
        for context in (
            patch.object(LocalDispatcher, "start_dispatch", start_dispatch),  # the number of rows would be a value
            patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
            patch.object(torch, "are_deterministic_algorithms_enabled", lambda: True),
            patch.object(fusion, "is_on_gpu", lambda _: one_pass),
            torch.device("meta"),
            shapes_on_meta(),
        ):
            stack.enter_context(context)
        layer = ShortcutLayer(config, balance_groups=2).to(torch.bfloat16)
        x = torch.empty(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        angles = torch.empty(tokens, config.qk_rope_head_dim // 2, dtype=torch.complex64)
        with found["forward"]:
            y, statistics = layer(x, angles, None)
        grads = torch.empty_like(y), torch.empty_like(statistics.balance)
        with found["backward"]:
            torch.autograd.backward((y, statistics.balance), grads)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flash")
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args()
    sums: dict[str, dict[str, int]] = {}
    for way, one_pass in (("expressions", False), ("one pass", True)):
        found = layer_traffic(preset(options.model), options.tokens, one_pass)
        for phase, traffic in found.items():
            rows = [
                [name, f"{traffic.calls[name]}", f"{count / 1e9:.2f}"] for name, count in traffic.bytes.most_common(20)
            ]
            title = f"{options.model}, {options.tokens} tokens, {way}, {phase}: {traffic.total / 1e9:.1f} GB"
            print_table(title, COLUMNS, rows)
            sums[f"{way}, {phase}"] = dict(traffic.bytes)
    print_json("traffic", {"model": options.model, "tokens": options.tokens, "bytes": sums})


if __name__ == "__main__":
    main()
