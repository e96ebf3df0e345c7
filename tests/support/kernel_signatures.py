"""The kernels of `parallel/kernels/one_pass.py` and `rotary.py` as a training run launches them, to compile them."""

from __future__ import annotations

from typing import Any

Compilation = tuple[Any, dict[str, str], dict[str, Any]]  # kernel, types of arguments, constants


def one_pass_compilations(row_types: tuple[str, ...]) -> dict[str, Compilation]:
    """At the flash sizes: rows of 6,144, 64 heads of 128 + 64 columns, values of 128."""
    from parallel.kernels import one_pass, rotary, sums

    found: dict[str, Compilation] = {}

    def add(name: str, kernel: Any, pointers: dict[str, str], constants: dict[str, Any]) -> None:
        others = {one: "i32" for one in kernel.arg_names if one not in pointers and one not in constants}
        others |= {one: "fp32" for one in ("reciprocal", "eps") if one in others}
        found[name] = kernel, pointers | others, constants

    row, by_column = {"SIZE": 8192, "STEPS": 13}, {"BLOCKS": one_pass.BLOCKS, "STEPS": 8, "COLUMNS": one_pass.COLUMNS}
    heads = {"HEADS": 64, "NOPE": 128, "PAIRS": 32}
    for dtype in row_types:
        rows = f"*{dtype}"
        norm = {"x": rows, "gain": "*fp32", "inverses": "*fp32"}
        forward = norm | dict.fromkeys(("y", "total", "out"), rows)
        backward = norm | dict.fromkeys(("grad_total", "grad", "grad_x"), rows) | {"partial": "*fp32"}
        for added in (False, True):
            constants = row | {"ADD": added}
            add(f"norm-{added}-{dtype}", one_pass.norm_kernel, forward, constants)
            constants = constants | {"ROWS": one_pass.ROWS}
            add(f"norm_backward-{added}-{dtype}", one_pass.norm_backward_kernel, backward, constants)
        add(f"add-{dtype}", sums.add_kernel, dict.fromkeys(("x", "y", "z", "out"), rows), {"BLOCK": sums.BLOCK})
        gate = dict.fromkeys(("gate", "up", "out"), rows)
        add(f"gate-{dtype}", one_pass.gate_kernel, gate, {"BLOCK": one_pass.BLOCK})
        backward = gate | {"grad": rows, "grads": rows}
        add(f"gate_backward-{dtype}", one_pass.gate_backward_kernel, backward, {"BLOCK": one_pass.BLOCK})
        angles = {"angles": "*fp32"}
        add(f"rotate-{dtype}", rotary.rotate_kernel, angles | {"x": rows}, {"HEADS": 64, "PAIRS": 32})
        add(f"rotate_back-{dtype}", rotary.rotate_back_kernel, angles | {"x": rows, "out": rows}, heads)
        keys = angles | dict.fromkeys(("k_nope", "k_rope", "key"), rows)
        add(f"keys-{dtype}", rotary.keys_kernel, keys, heads)
        backward = angles | dict.fromkeys(("grad_key", "grad_value", "grad_expanded", "grad_rope"), rows)
        add(f"keys_backward-{dtype}", rotary.keys_backward_kernel, backward, heads | {"STEPS": 6, "VALUE": 128})
    add("split", sums.split_kernel, {"x": "*fp32", "out": "*bf16"}, {"BLOCK": sums.BLOCK})
    add("gain", one_pass.gain_kernel, {"partial": "*fp32", "out": "*fp32"}, by_column)
    return found
