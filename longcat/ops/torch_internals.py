"""Every private name of torch that the model uses, each behind a typed function; see `parallel/torch_internals.py`.

Tried on torch 2.13.0; short runs on 2.14.1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cpu_has_avx512_bf16() -> bool:
    """Whether this processor has AVX512-BF16; the public capability string names no feature beyond AVX512."""
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(probe and probe())


def cpu_has_amx_tiles() -> bool:
    """Whether this processor has AMX; see `cpu_has_avx512_bf16`."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(probe and probe())


def allow_recompilations(count: int) -> None:
    """Let torch.compile keep at least ``count`` variants of one function; the limit is in dynamo's configuration."""
    torch._dynamo.config.recompile_limit = max(count, torch._dynamo.config.recompile_limit)


def softmax_backward(grad: Tensor, probabilities: Tensor) -> Tensor:
    """The gradient of the input of softmax over the last dimension, float32, in autograd's own kernel."""
    return torch.ops.aten._softmax_backward_data(grad, probabilities, -1, torch.float32)


def sparse_row_sums(sparse: Tensor, rows: Tensor) -> Tensor:
    """A CSR matrix [T, P] times rows [P, D], rounded once: the kernel of `torch.sparse.mm(…, "sum")`."""
    return torch.ops.aten._sparse_mm_reduce_impl(sparse, rows, "sum")[0]
