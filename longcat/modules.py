"""The plain building blocks: linear layer, RMSNorm, embedding and the dense SwiGLU feed-forward network.

Their weights are uninitialised: `longcat.init` fills them, on every layout.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from longcat.interfaces import SequenceModule, VocabularyModule, WeightGradModule, local_tensor
from longcat.ops import fusion
from longcat.ops.elementwise import added_norm, rms_norm
from longcat.ops.matmul import StoreWeightGrad, gated_linear, linear, rotated_linear
from longcat.ops.recomputed import recomputable, recompute_by
from longcat.recompute_values import Value


def grad_store(module: WeightGradModule, name: str) -> StoreWeightGrad | None:
    """Stores the gradient of ``module``'s parameter ``name``; None if the backward is to compute it."""
    store = module.weight_grad_store
    return None if store is None else partial(store.put, module, name)


class Linear(WeightGradModule):
    """y = x Wᵀ without bias; weight [out, in]."""

    def __init__(self, num_inputs: int, num_outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_outputs, num_inputs))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, local_tensor(self.weight), grad_store(self, "weight"))


class GatedLinear(Linear):
    """y = (silu(gate) · up) Wᵀ without bias."""

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:  # type: ignore[override]
        return gated_linear(gate, up, local_tensor(self.weight), grad_store(self, "weight"))


class RotatedLinear(Linear):
    """y = x Wᵀ without bias, in heads of ``head_width``; rotates their last columns on a GPU, if it is given angles."""

    def __init__(self, num_inputs: int, num_outputs: int, head_width: int) -> None:
        super().__init__(num_inputs, num_outputs)
        self.head_width = head_width

    def forward(self, x: Tensor, angles: Tensor | None = None) -> Tensor:
        if angles is None:
            return super().forward(x)
        return rotated_linear(x, local_tensor(self.weight), self.head_width, angles, grad_store(self, "weight"))


class RMSNorm(nn.Module):
    """Root-mean-square norm with a gain; computes in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


def add_and_norm(norm: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """x + y and its RMSNorm, which the backward can compute again from the sum; on a GPU in one pass."""
    assert isinstance(norm, RMSNorm)
    if not fusion.is_on_gpu(x):
        total = x + y
        return total, recomputable(Value.norms, norm, total)
    total, normed = added_norm(x, y, norm.weight, norm.eps)
    return total, recompute_by(Value.norms, normed, norm, total)


class Embedding(SequenceModule, VocabularyModule):
    """Token ids [B, S] → rows [B, s, D] of the local positions; weight [V, D]."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.vocabulary.lookup(self.sequence.select(tokens), local_tensor(self.weight))
        return self.sequence.reduce(rows)


class FeedForward(SequenceModule):
    """down(silu(gate x) · up x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, hidden)
        self.up_proj = Linear(width, hidden)
        self.down_proj = GatedLinear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, s, D] → [B, s, D]."""
        x = self.sequence.gather(x)
        gate, up = recomputable(Value.ffn_gate, self.gate_proj, x), recomputable(Value.ffn_up, self.up_proj, x)
        return self.sequence.reduce(self.down_proj(gate, up))
