"""Every private name of torch that the model uses, each behind a typed function; see `parallel/torch_internals.py`.

Tried on torch 2.13.0; short runs on 2.14.1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # sees every operator
from torch.utils._pytree import tree_leaves as tree_leaves  # of nested arguments and results


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


def fake_tensor_mode() -> FakeTensorMode:
    """A mode whose tensors have shapes and no memory; the public way to it runs torch's compiler."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def storage_key(storage: torch.UntypedStorage) -> int:
    """What is equal for two views of one memory; a storage without memory has no address."""
    return storage._cdata


def operator_name(operator: Any) -> str:
    """The name of an operator that a dispatch mode sees, without its overload."""
    return str(operator._opname)


def product_flops(operator: Any, args: Any, kwargs: Any, out: Any) -> float:
    """FLOPs of an operator's products by the formulas of `torch.utils.flop_counter`; 0 where it has none."""
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(operator._overloadpacket)
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=out))
