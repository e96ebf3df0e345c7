"""What one layer keeps for its backward and computes, by kind of recomputation: traced, without memory or values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from longcat.config import ModelConfig
from longcat.layer import ShortcutLayer
from longcat.ops.torch_internals import fake_tensor_mode
from parallel.config import ParallelConfig
from parallel.plan.recorder import OUTSIDE, AllocationRecorder
from parallel.plan.shapes import RoutingAssumption, shapes_only
from parallel.recompute import recompute_layer


@dataclass(frozen=True)
class LayerCost:
    """Memory and FLOPs of one layer for one micro-batch, on a rank that has all experts."""

    kept_bytes: int  # that live between the forward and the backward, with the layer's output and without its input
    flops: float  # of matrix products and attention, forward and backward


def layer_cost(config: ModelConfig, parallel: ParallelConfig, tokens: int) -> LayerCost:
    """Trace a layer in bfloat16 on a sequence of ``tokens``, with a GPU's attention and the expected FFN experts."""
    recorder, mode = AllocationRecorder(), fake_tensor_mode()
    with torch.device("meta"):
        layer = ShortcutLayer(config, 1).to(torch.bfloat16)
    recompute_layer(layer, parallel)
    with shapes_only(RoutingAssumption(config.expected_ffn_experts), recorder, True), mode, recorder:
        layer.to_empty(device="cpu")
        x = torch.empty(1, tokens, config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        angles = torch.empty(tokens, config.qk_rope_head_dim // 2, dtype=torch.complex64)
        before = recorder.now
        y, statistics = layer(x, angles, None)
        kept = recorder.now - before
        torch.autograd.backward((y, statistics.balance), (torch.empty_like(y), torch.empty_like(statistics.balance)))
    return LayerCost(kept, recorder.phases[OUTSIDE].flops)
