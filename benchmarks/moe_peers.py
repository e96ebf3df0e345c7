"""The MoE layers of torchtitan and DeepSpeed for a configuration of ours, with the values of our layer.

Differences from ours, and how they are handled:

- torchtitan's router gets float32 from autocast, which CPUs do not support, so on a CPU it would multiply, select and
  weigh in bfloat16. Here it gets a gate that multiplies in float32, as on a GPU.
- DeepSpeed divides a token's gates by their sum and has no scaling factor, for any K. So its outputs equal ours
  divided by the sum of our gates. It pads each expert to the rows of the busiest one (`drop_tokens=False`). Its
  experts are one module each: here with gate and up in one GEMM, as in ours.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from longcat.config import ModelConfig
from longcat.moe import MoE
from parallel.deepspeed.setup import quiet_import


def torchtitan_layer(config: ModelConfig, ours: MoE) -> nn.Module:
    """torchtitan's MoE: x [B, S, D] → [B, S, D]. ImportError where it is not installed."""
    warnings.filterwarnings("ignore", "In CPU autocast")
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.moe import MoE as TitanMoE
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    width, num = config.hidden_size, config.num_experts
    layer: Any = TitanMoE.Config(
        num_experts=num,
        router=TokenChoiceTopKRouter.Config(
            num_experts=num,
            gate=Linear.Config(in_features=width, out_features=num, bias=False),
            top_k=config.top_k,
            score_func="softmax",
            route_scale=config.routed_scaling_factor,
        ),
        routed_experts=RoutedExperts.Config(
            inner_experts=GroupedExperts.Config(dim=width, hidden_dim=config.expert_hidden_size, num_experts=num),
            token_dispatcher=LocalTokenDispatcher.Config(num_experts=num, top_k=config.top_k),
        ),
    ).build()
    layer.router.gate = Float32Gate(width, num, bias=False)
    layer.to(ours.experts.down.device)
    experts = layer.routed_experts.inner_experts
    gate, up = ours.experts.gate_up.detach().chunk(2, 1)
    with torch.no_grad():
        layer.router.gate.weight.copy_(ours.router.classifier.weight)
        for mine, theirs in ((gate, experts.w1_EFD), (up, experts.w3_EFD), (ours.experts.down, experts.w2_EDF)):
            theirs.copy_(mine)
    dtype = ours.experts.down.dtype
    for parameter in layer.parameters():  # not `to`, which would round its float32 counters
        parameter.data = parameter.data.to(dtype)
    return layer.train()  # type: ignore[no-any-return]


class Float32Gate(nn.Linear):
    """A linear layer that multiplies in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float())


class SwiGLU(nn.Module):
    """One expert for DeepSpeed's layer, which copies it."""

    def __init__(self, width: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False, dtype=dtype)
        self.down = nn.Linear(hidden, width, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)  # type: ignore[no-any-return]


def deepspeed_layer(config: ModelConfig, ours: MoE, capacity_factor: float | None) -> nn.Module:
    """DeepSpeed's MoE: x [T, D] → ([T, D], its balance loss, counts); None drops no token."""
    quiet_import("cpu" if not torch.cuda.is_available() else "cuda")
    from deepspeed import comm
    from deepspeed.moe.layer import MoE as DeepSpeedMoE

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if not comm.is_initialized():
        comm.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    dtype = ours.experts.down.dtype
    layer: Any = DeepSpeedMoE(
        config.hidden_size,
        SwiGLU(config.hidden_size, config.expert_hidden_size, dtype),
        num_experts=config.num_experts,
        k=config.top_k,
        capacity_factor=capacity_factor or 1.0,
        drop_tokens=capacity_factor is not None,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    layer.set_deepspeed_parallelism()
    layer.to(ours.experts.down.device)
    with torch.no_grad():
        layer.deepspeed_moe.gate.wg.to(dtype).weight.copy_(ours.router.classifier.weight)
        for number, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
            expert.gate_up.weight.copy_(ours.experts.gate_up[number])
            expert.down.weight.copy_(ours.experts.down[number])
    return layer.train()  # type: ignore[no-any-return]
