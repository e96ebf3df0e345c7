"""Triton kernels for the operators of `longcat/ops/torch_library.py`, on CUDA tensors; imported by `install` only."""

from __future__ import annotations

import logging

import torch

from longcat.ops.torch_library import NAME

_installed: list[torch.library.Library] = []  # kept alive: a garbage-collected library unregisters its kernels


def install(device: torch.device) -> bool:
    """Register the kernels for CUDA tensors; return whether they run. Without Triton, log that plain versions run."""
    if device.type != "cuda":
        return False
    if not _installed:
        try:
            from parallel.kernels import embedding, grouped, one_pass, permute, rotary, rows, sums
        except ImportError as error:
            logging.getLogger(__name__).warning("no Triton kernels (%s); plain torch operators run instead", error)
            return False
        library = torch.library.Library(NAME, "IMPL")
        for launch in (
            permute.plan,
            permute.count_selections,
            permute.spread_gates,
            rows.gather_rows,
            rows.sum_rows,
            rows.combine_rows,
            rows.combine_rows_backward,
            rows.dot_rows,
            embedding.embedding_gradient,
            grouped.grouped_rows,
            grouped.grouped_sums,
            one_pass.norm_rows,
            one_pass.norm_rows_backward,
            one_pass.add_norm_rows,
            one_pass.add_norm_rows_backward,
            one_pass.gate_rows,
            one_pass.gate_rows_backward,
            sums.add_three,
            sums.split_rows,
            rotary.rotate_,
            rotary.rotate_back,
            rotary.join_keys,
            rotary.keys_and_values_backward,
        ):
            library.impl(launch.__name__, launch, "CUDA")
        _installed.append(library)
    return True
