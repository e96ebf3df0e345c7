"""Every private name of torch that the model uses, each behind a typed function; see `parallel/torch_internals.py`.

Tried on torch 2.13.0; short runs on 2.14.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
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


@dataclass(frozen=True)
class KernelCall:
    """What a fused attention kernel needs beside its operands; its mask is causal, aligned at the last positions.

    With bounds, int32 [segments + 1], the operands are [rows, H, W] and each segment attends to itself alone;
    without, they are [B, positions, H, W].
    """

    query_bounds: Tensor | None
    key_bounds: Tensor | None
    longest_queries: int
    longest_keys: int
    scale: float


class AttentionKernel(Protocol):
    """A fused kernel: forward returns the output, then what `backward` needs; that returns the three gradients."""

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, call: KernelCall) -> tuple[Tensor, ...]: ...

    @classmethod
    def backward(
        cls, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, state: list[Tensor], call: KernelCall
    ) -> tuple[Tensor, ...]: ...


class FlashAttention:
    """Flash attention; the public `varlen_attn` hides its products from FLOP counters, and SDPA aligns masks otherwise.

    Its backward adds in a fixed order where `torch.use_deterministic_algorithms` asks for it.
    """

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, call: KernelCall) -> tuple[Tensor, ...]:
        bounds = call.query_bounds, call.key_bounds, call.longest_queries, call.longest_keys
        run = torch.ops.aten._flash_attention_forward
        out, log_sum, random, unused, _ = run(query, key, value, *bounds, 0.0, True, False, scale=call.scale)
        return out, log_sum, random, unused

    @classmethod
    def backward(
        cls, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, state: list[Tensor], call: KernelCall
    ) -> tuple[Tensor, ...]:
        log_sum, random, unused = state
        bounds = call.query_bounds, call.key_bounds, call.longest_queries, call.longest_keys
        operands = grad.contiguous(), query, key, value, out, log_sum
        run = torch.ops.aten._flash_attention_backward
        return run(*operands, *bounds, 0.0, True, random, unused, scale=call.scale)  # type: ignore[no-any-return]


class EfficientAttention:
    """xFormers' memory-efficient attention, the one fused kernel for float32; SDPA aligns its masks otherwise."""

    CAUSAL_FROM_BOTTOM_RIGHT = 2  # its mask for queries that are the last positions of the keys

    @classmethod
    def forward(cls, query: Tensor, key: Tensor, value: Tensor, call: KernelCall) -> tuple[Tensor, ...]:
        operands = (query, key, value) if call.query_bounds is None else (query[None], key[None], value[None])
        out, log_sum, seed, offset, _, _ = torch.ops.aten._efficient_attention_forward(
            *operands,
            None,
            call.query_bounds,
            call.key_bounds,
            None if call.query_bounds is None else call.longest_queries,
            None if call.query_bounds is None else call.longest_keys,
            0.0,
            cls.CAUSAL_FROM_BOTTOM_RIGHT,
            True,
            scale=call.scale,
        )
        return out if call.query_bounds is None else out[0], log_sum, seed, offset

    @classmethod
    def backward(
        cls, grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, state: list[Tensor], call: KernelCall
    ) -> tuple[Tensor, ...]:
        packed = call.query_bounds is not None
        grad, query, key, value, out = (x[None] if packed else x for x in (grad, query, key, value, out))
        log_sum, seed, offset = state
        grads = torch.ops.aten._efficient_attention_backward(
            grad.contiguous(),
            query,
            key,
            value,
            None,
            out,
            call.query_bounds,
            call.key_bounds,
            call.longest_queries,
            call.longest_keys,
            log_sum,
            0.0,
            seed,
            offset,
            cls.CAUSAL_FROM_BOTTOM_RIGHT,
            False,
            scale=call.scale,
        )[:3]
        return tuple(x[0] for x in grads) if packed else tuple(grads)


class QuickFakeTensorMode(FakeTensorMode):
    """A fake tensor mode with a smaller key for its cache of operators: a look-up takes a third of the time.

    torch's key has twenty fields of each tensor, for sparse, quantised and symbolic ones; ours are plain.
    """

    def _prep_args_for_hash(self, result: list[object], args: Any, state: Any, id_hashed_objects: list[object]) -> None:
        result.append(type(args))
        result.append(len(args))
        if isinstance(args, dict):
            result.extend(args)
            args = args.values()
        for arg in args:
            kind = type(arg)
            if kind is FakeTensor and self._is_plain(arg):
                result.append(arg.shape)
                result.append(arg.stride())
                result.append(arg.dtype)
                result.append(arg.fake_device)
                result.append(arg.storage_offset())
                result.append(arg.requires_grad)
            elif kind in (list, tuple, dict):
                self._prep_args_for_hash(result, arg, state, id_hashed_objects)
            elif kind in PLAIN_ARGUMENTS:
                result.append(kind)
                result.append(arg)
            else:
                super()._prep_args_for_hash(result, (arg,), state, id_hashed_objects)

    def _is_plain(self, tensor: FakeTensor) -> bool:
        if tensor.fake_mode is not self or tensor.constant is not None or tensor.layout is not torch.strided:
            return False
        return not (tensor.is_conj() or tensor.is_neg())


PLAIN_ARGUMENTS = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}


def fake_tensor_mode() -> FakeTensorMode:
    """A mode whose tensors have shapes and no memory; the public way to it runs torch's compiler."""
    return QuickFakeTensorMode(allow_non_fake_inputs=True)


def storage_key(storage: torch.UntypedStorage) -> int:
    """A key that all views of one storage share; storages without memory have no address to compare."""
    return storage._cdata


def operator_name(operator: Any) -> str:
    """The name of an operator that a dispatch mode sees, without its overload."""
    return str(operator._opname)


def product_flops(operator: Any, args: Any, kwargs: Any, out: Any) -> float:
    """FLOPs of an operator's products by the formulas of `torch.utils.flop_counter`; 0 where it has none."""
    from torch.utils.flop_counter import flop_registry

    formula = flop_registry.get(operator._overloadpacket)
    args = [one for one in args if not isinstance(one, torch.dtype)]  # the formula of addmm would take it for a shape
    return 0.0 if formula is None else float(formula(*args, **kwargs, out_val=out))
