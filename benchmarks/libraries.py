"""Two of torch's own functions beside this project's: chunked linear cross-entropy, and operator registration.

    python -m benchmarks.libraries                     # 2 threads, T = 2,048, D = 512, V = 8,192 and 131,072
    python -m benchmarks.libraries --rounds 5 --vocabularies 8192

Errors are relative to float64, over 256 tokens: the largest of |loss| and the norms of both gradients.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from timeit import repeat
from typing import Any

import torch
from torch import Tensor
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import cross_entropy
from torch.nn.functional import linear_cross_entropy as torch_linear_cross_entropy

from benchmarks.common import peak_memory_gib, print_json, print_table
from longcat.ops.cross_entropy import chunk_rows, linear_cross_entropy
from longcat.ops.rows import gather_rows

WIDTH, COMPARED_TOKENS, IGNORED = 512, 256, -100
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [T, D], weight [V, D], labels [T] → Σ of the losses


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    valid = labels != IGNORED
    return linear_cross_entropy(hidden, weight, labels.clamp_min(0), valid)[0]


def torch_auto(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's chunked function with the settings that it picks itself."""
    options = LinearCrossEntropyOptions()
    return torch_linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)


def torch_same_chunks(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's chunked function with our chunks and its most accurate policy."""
    options = LinearCrossEntropyOptions(
        batch_chunk_size=chunk_rows(weight), chunking_method=None, acc_policy="accurate", acc_dtype=torch.float32
    )
    return torch_linear_cross_entropy(hidden, weight, labels, reduction="sum", options=options)


LOSSES: dict[str, Loss] = {"ours": ours, "torch, auto": torch_auto, "torch, accurate, our chunks": torch_same_chunks}


def inputs(tokens: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [T, D], weight [V, D], labels [T] of which one in ten does not count."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocabulary, WIDTH, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    return hidden, weight, labels.masked_fill(torch.rand(tokens, generator=generator) < 0.1, IGNORED)


def results(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    total = loss(hidden, weight, labels)
    return total.detach(), *torch.autograd.grad(total, (hidden, weight))


def relative_error(loss: Loss, vocabulary: int, dtype: torch.dtype) -> list[float]:
    """Of the loss, the gradient by the hidden states and the gradient by the head."""
    hidden, weight, labels = inputs(COMPARED_TOKENS, vocabulary, dtype)
    exact = [one.detach().double().requires_grad_() for one in (hidden, weight)]
    reference = results(lambda x, w, y: cross_entropy(x @ w.t(), y, reduction="sum"), exact[0], exact[1], labels)
    found = results(loss, hidden, weight, labels)
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, reference, strict=True)]


def compare_losses(tokens: int, vocabulary: int, dtype: torch.dtype, rounds: int) -> list[dict[str, Any]]:
    """Seconds of forward and backward (the median of ``rounds`` in turn), peak memory and errors of each function."""
    tensors = inputs(tokens, vocabulary, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    peaks: dict[str, float | None] = {}
    latest: dict[str, tuple[Tensor, ...]] = {}
    for _ in range(rounds):
        for name, loss in LOSSES.items():

            def program(name: str = name, loss: Loss = loss) -> None:
                latest.pop(name, None)
                start = time.perf_counter()
                latest[name] = results(loss, *tensors)
                seconds[name].append(time.perf_counter() - start)

            peak = peak_memory_gib(program)
            peaks.setdefault(name, peak)
    return [
        {"V": vocabulary, "dtype": str(dtype).removeprefix("torch."), "function": name,
         "seconds": statistics.median(seconds[name]), "peak_gib": peaks[name],
         "same_bits": all(map(torch.equal, latest[name], latest["ours"])),
         "errors": relative_error(loss, vocabulary, dtype)}
        for name, loss in LOSSES.items()
    ]  # fmt: skip


@torch.library.custom_op("longcat_benchmark::gather_rows", mutates_args=())
def custom_gather_rows(source: Tensor, index: Tensor) -> Tensor:
    return source.index_select(0, index)


def compare_calls(number: int = 20000) -> dict[str, float]:
    """Microseconds of one call that gathers 4 rows of 4 numbers: the least of 7 averages."""
    source, index = torch.randn(4, 4), torch.arange(4)
    calls: dict[str, Callable[[], Any]] = {
        "index_select": lambda: source.index_select(0, index),
        "our registration": lambda: gather_rows(source, index),
        "torch.library.custom_op": lambda: custom_gather_rows(source, index),
    }
    return {name: min(repeat(call, number=number, repeat=7)) / number * 1e6 for name, call in calls.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[8192, 131072])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore", message="linear_cross_entropy")
    calls = compare_calls()
    print_table("one call of an operator", ["how", "µs"], [[name, f"{took:.2f}"] for name, took in calls.items()])
    pairs = [(vocabulary, dtype) for vocabulary in args.vocabularies for dtype in (torch.float32, torch.bfloat16)]
    losses = [row for vocabulary, dtype in pairs for row in compare_losses(args.tokens, vocabulary, dtype, args.rounds)]
    table = [
        [f"{row['V']:,}", row["dtype"], row["function"], f"{row['seconds']:.2f}",
         "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}", "yes" if row["same_bits"] else "no",
         *(f"{error:.1e}" for error in row["errors"])]
        for row in losses
    ]  # fmt: skip
    columns = ["V", "dtype", "function", "s", "peak GiB", "our bits", "loss", "∂hidden", "∂weight"]
    print_table(
        f"forward and backward, {args.tokens:,} tokens of width {WIDTH}, {args.threads} threads", columns, table
    )
    print_json("libraries", {"call_microseconds": calls, "losses": losses})


if __name__ == "__main__":
    main()
