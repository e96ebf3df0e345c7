"""Triton kernels are bitwise identical to their plain versions in the interpreter, and compile without atomics."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longcat.ops.embedding import embedding
from longcat.ops.torch_library import sum_into_partials, tree_sum

triton = pytest.importorskip("triton", reason="needs the triton package, which .[dev] brings")
ROOT = Path(__file__).resolve().parents[3]
ATOMIC = re.compile(r"^\s*(@\S+\s+)?(atom|red)\b.*", re.MULTILINE)
# In bfloat16, sm_80 multiplies by a fused sum with -0, which rounds once, as a product does
FUSED = re.compile(r"\bfma\.\S*f32")
ROW_TYPES = ("fp32", "bf16")
PRODUCTS = "grouped"  # names of kernels that multiply matrices, whose sums are fused


@pytest.mark.parametrize("share", [0.3, pytest.param(1.0, marks=pytest.mark.long)])
def test_kernels_equal_plain_versions_bitwise(share: float) -> None:
    """Random routings, empty experts, no tokens, identity experts only: a process of its own for the interpreter.

    The named examples always run. The random ones are the same in every run, so a share of them finds nearly as much.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "LONGCAT_EXAMPLES": str(share)}
    cases = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    answer = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, timeout=300, check=False
    )
    assert answer.returncode == 0, answer.stdout[-6000:]
    assert re.search(r"\b13 passed", answer.stdout), answer.stdout


def compilations() -> dict[str, tuple[Any, dict[str, str], dict[str, Any]]]:
    """Each kernel as a training run launches it for the flash sizes: (kernel, types of arguments, constants)."""
    from parallel.kernels import embedding as table
    from parallel.kernels import grouped, permute, rows
    from tests.support.kernel_signatures import one_pass_compilations

    found: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {}
    for dtype in ROW_TYPES:
        row, index = f"*{dtype}", "*i64"
        sums = {"rows": row, "gates": "*fp32", "row_index": index, "x": row, "out": row, "width": "i32"}
        for weighted, identity in ((False, False), (True, False), (True, True)):
            constants = {"K": 12, "KP": 16, "STEPS": 4, "BLOCK": 1024, "WEIGHTED": weighted, "IDENTITY": identity}
            found[f"sum-{weighted}-{identity}-{dtype}"] = rows.sum_kernel, sums, constants
        backward = {"grad": row, "gates": "*fp32", "row_index": index, "x": row}
        backward |= {"grad_rows": row, "grad_gates": "*fp32", "grad_x": row, "width": "i32"}
        for identity in (False, True):
            constants = {"K": 12, "KP": 16, "GATE_STEPS": 4, "PARTIALS": 256, "STEPS": 8, "IDENTITY": identity}
            found[f"combine_backward-{identity}-{dtype}"] = rows.combine_backward_kernel, backward, constants
        dot = {"a": row, "b": row, "out": "*fp32", "width": "i32"}
        found[f"dot-{dtype}"] = rows.dot_kernel, dot, {"PARTIALS": 256, "STEPS": 8}
        gather = {"source": row, "index": index, "out": row, "width": "i32"}
        found[f"gather-{dtype}"] = rows.gather_kernel, gather, {"BLOCK": 1024}
        run = {"ids": index, "first": index, "last": index, "partial": "*fp32", "out": row}
        run |= {"num_rows": "i32", "width": "i32"}
        block = {"grad": row, "order": index} | run
        constants = {"BLOCK": table.BLOCK, "COLUMNS": 1024}
        found[f"embedding_blocks-{dtype}"] = table.block_kernel, block, constants
        found[f"embedding_runs-{dtype}"] = table.run_kernel, run, constants
    sizes = dict.fromkeys(("inner", "columns", "num_experts", "outputs", "inputs"), "i32")
    strides = ("a_row", "a_inner", "b_expert", "b_inner", "b_column", "a_column", "b_row")
    for dtype in ROW_TYPES:
        types = {"a": f"*{dtype}", "b": f"*{dtype}", "out": f"*{dtype}", "expert_of": "*i64", "tile_ends": "*i64"}
        types |= {"ends": "*i32"} | sizes | dict.fromkeys(strides, "i64")
        constants = {"ROWS": grouped.ROWS, "COLUMNS": grouped.COLUMNS, "INNER": grouped.INNER}
        for name, kernel in (("rows", grouped.rows_kernel), ("sums", grouped.sums_kernel)):
            own = {argument: types[argument] for argument in kernel.arg_names if argument in types}
            found[f"{PRODUCTS}-{name}-{dtype}"] = kernel, own, constants
    histogram = {"indices": "*i64", "histogram": "*i32", "size": "i32", "num_routed": "i32", "num_blocks": "i32"}
    found["histogram"] = permute.histogram_kernel, histogram, {"BLOCK": permute.BLOCK, "EXPERTS": permute.EXPERTS}
    spread = {"grad": "*fp32", "indices": "*i64", "out": "*fp32", "num_routed": "i32"}
    found["spread"] = permute.spread_kernel, spread, {"K": 12, "BLOCK": permute.SPREAD}
    scan = {"histogram": "*i32", "counts": "*i64", "num_blocks": "i32"}
    found["scan"] = permute.scan_kernel, scan, {"SCAN": 512}
    row_index = {"indices": "*i64", "histogram": "*i32"}
    row_index |= dict.fromkeys(("ends", "counts", "token", "selection", "row_index"), "*i64")
    row_index |= dict.fromkeys(("size", "num_blocks", "num_experts", "top_k"), "i32")
    found["row_index"] = permute.row_index_kernel, row_index, {"BLOCK": permute.BLOCK}
    return found | one_pass_compilations(ROW_TYPES)


def compiled_for(capability: int, kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> Any:
    """As at a launch: aligned memory, widths in whole vectors."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {argument: types.get(argument, "constexpr") for argument in kernel.arg_names}
    whole = [["tt.divisibility", 16]]
    aligned = {(index,): whole for index, argument in enumerate(kernel.arg_names) if argument in types}
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})


@pytest.mark.parametrize("capability", [80, 90, 100], ids=lambda number: f"sm_{number}")
def test_kernels_compile_without_atomics_or_fused_sums(capability: int) -> None:
    """A cubin comes out, no instruction is an atomic, and no product is fused with a sum."""
    for name, compilation in compilations().items():
        compiled = compiled_for(capability, *compilation)
        assert compiled.asm["cubin"][:4] == b"\x7fELF", name
        ptx = compiled.asm["ptx"]
        assert f".target sm_{capability}" in ptx, name
        assert not ATOMIC.search(ptx), f"{name}: {ATOMIC.search(ptx)}"
        fused = FUSED.search(ptx) is not None and not name.startswith(PRODUCTS)
        assert not fused, f"{name}: a fused product and sum rounds differently from the plain version"


def test_kernels_compile_where_integers_are_one() -> None:
    """A launch makes a constant of an integer that is 1 (one row, one head, adjacent columns): it has no methods."""
    for name, (kernel, types, constants) in compilations().items():
        if name.endswith("-fp32"):
            continue  # the same source as in bfloat16
        ones = [argument for argument, kind in types.items() if kind in ("i32", "i64")]
        others = {argument: kind for argument, kind in types.items() if argument not in ones}
        compiled = compiled_for(90, kernel, others, constants | dict.fromkeys(ones, 1))
        assert compiled.asm["cubin"][:4] == b"\x7fELF", name


def test_the_search_for_atomics_finds_one() -> None:
    for line in ("\tatom.global.add.u32 %r1, [%rd1], 1;", "\t@%p1 red.global.add.f32 [%rd1], %f1;"):
        assert ATOMIC.search(line)
    assert not ATOMIC.search("\tadd.f32 %f3, %f1, %f2; // red")


@pytest.mark.parametrize("width", [1, 3, 256, 600])
def test_the_order_of_a_products_sum_is_the_documented_one(width: int) -> None:
    """Partial sums, then their tree sum, spelled out with Python's loops."""
    values = torch.randn(3, width)
    size = min(256, 1 << (width - 1).bit_length())
    wanted = []
    for row in values:
        partials = [torch.zeros(()) for _ in range(size)]
        for column in range(width):
            partials[column % size] = partials[column % size] + row[column]
        while len(partials) > 1:
            half = len(partials) // 2
            partials = [a + b for a, b in zip(partials[:half], partials[half:], strict=True)]
        wanted.append(partials[0])
    assert torch.equal(tree_sum(sum_into_partials(values))[:, 0], torch.stack(wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_embedding_gradient_is_rounded_once(dtype: torch.dtype) -> None:
    """A row used 2,000 times has the sum of 2,000 numbers to the last place, where adding in bfloat16 stalls."""
    ids = torch.cat((torch.zeros(2000, dtype=torch.int64), torch.tensor([4, 2, 7])))
    weight = torch.zeros(5, 3, dtype=dtype, requires_grad=True)
    rows = embedding(ids, weight, allow_out_of_range=True)
    upstream = torch.rand(rows.shape).to(dtype)
    (grad,) = torch.autograd.grad(rows, weight, upstream)
    wanted = torch.zeros(6, 3, dtype=torch.float64).index_add_(0, ids.clamp_max(5), upstream.double())[:5]
    torch.testing.assert_close(grad, wanted.to(dtype), rtol=1e-6 if dtype is torch.float32 else 0, atol=0)
