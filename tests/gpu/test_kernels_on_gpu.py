"""Triton kernels on a GPU: bitwise identical to the plain versions on the CPU, repeatable.

`make test-gpu` runs this folder. Nothing here has run yet: the project has had no GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from longcat.documents import Documents
from longcat.ops.attention import causal_attention
from parallel.kernels import install
from tests.support.kernel_cases import (
    Case,
    Heads,
    assert_bits,
    check_combine,
    check_embedding,
    check_gate,
    check_gather,
    check_grouped,
    check_norm,
    check_plan,
    check_rotation,
    check_selections,
    check_sum,
    check_sums,
)

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16]


def case(dtype: torch.dtype, **changes: Any) -> Case:
    sizes: dict[str, Any] = {
        "tokens": 515,
        "experts": 32,
        "zero": 16,
        "top_k": 12,
        "width": 768,
        "skew": 0.0,
        "seed": 1,
    }
    return Case(**(sizes | changes), dtype=dtype, device="cuda")


SHAPES: dict[str, dict[str, Any]] = {
    "usual": {},
    "flash": {"tokens": 300, "experts": 512, "zero": 256, "width": 6144},
    "empty_experts": {"skew": 1e6, "top_k": 2},
    "all_identity": {"skew": -1e6},
    "no_tokens": {"tokens": 0},
    "one_token": {"tokens": 1, "top_k": 1},
    "one_column": {"width": 1},
    "odd_width": {"width": 257},
    "many_tokens": {"tokens": 20000, "width": 8},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_plain_versions_bitwise(shape: str, dtype: torch.dtype) -> None:
    routing = case(dtype, **SHAPES[shape])
    for check in (check_plan, check_selections, check_gather, check_sum, check_sums, check_norm, check_gate):
        check(routing)
    check_combine(routing, True)
    check_combine(routing, False)
    check_grouped(routing, 256)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", [Heads(2, 70, 64, 128, 32, 128, 192), Heads(1, 5, 3, 20, 5, 24, 32)], ids=str)
def test_rotation_equals_plain_versions_bitwise(sizes: Heads, dtype: torch.dtype) -> None:
    check_rotation(sizes, dtype, 1, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("num_rows,places", [(1, 5000), (300, 4096), (131072, 4096), (5, 0)])
def test_embedding_gradient_equals_plain_version_bitwise(num_rows: int, places: int, dtype: torch.dtype) -> None:
    check_embedding(places, num_rows, 768, dtype, 1, "cuda")


def test_cuda_tensors_use_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """After `install` the operator of a CUDA tensor is the kernel's: on the GPU both give one result."""
    from parallel.kernels import rows

    assert install(torch.device("cuda"))
    routing = case(torch.bfloat16)
    values = routing.draw(routing.plan.token.shape[0], routing.width)
    assert_bits(
        torch.ops.longcat.sum_rows(values, routing.plan.row_index), rows.sum_rows(values, routing.plan.row_index)
    )


@pytest.mark.parametrize("masked", [False, True], ids=["one_document", "documents"])
def test_attention_backward_is_deterministic(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The widths of latent attention, with the deterministic setting of `parallel.device.make_deterministic`."""
    from parallel.device import make_deterministic

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    documents = Documents.of((torch.arange(2048) // 700)[None], torch.device("cuda")) if masked else None
    shapes = ((1, 2048, 8, 192), (1, 2048, 8, 192), (1, 2048, 8, 128))
    inputs = [torch.randn(*shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    upstream = torch.randn(1, 2048, 8, 128, device="cuda", dtype=torch.bfloat16)
    make_deterministic()
    try:
        query, key, value = inputs
        out = causal_attention(query, key, value, 0.07, documents)
        first = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
        for _ in range(10):
            again = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
            for mine, theirs in zip(again, first, strict=True):
                assert_bits(mine, theirs)
    finally:
        torch.use_deterministic_algorithms(False)
