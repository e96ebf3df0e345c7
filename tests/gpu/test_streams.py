"""On a GPU: a layer's results are bitwise independent of the streams of its collectives and experts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from longcat.config import ModelConfig
from longcat.layer import ShortcutLayer
from longcat.rope import rotary_angles
from parallel.collectives.streams import Cuda, SideStreamContext, StreamContext
from parallel.device import make_deterministic
from parallel.expert.dispatchers import AllToAllDispatcher
from parallel.kernels import install

pytestmark = pytest.mark.gpu
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=256,
    num_layers=2,
    num_heads=4,
    q_lora_rank=64,
    kv_lora_rank=64,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    ffn_hidden_size=512,
    expert_hidden_size=128,
    num_experts=8,
    num_zero_experts=4,
    top_k=4,
)


@pytest.fixture(autouse=True)
def _one_rank() -> Iterator[None]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    install(torch.device("cuda"))  # the plain operators would synchronise the host, and hide missing waits on streams
    make_deterministic()
    yield
    torch.use_deterministic_algorithms(False)
    dist.destroy_process_group()


def gradients(streams: StreamContext, chunks: int, after_attention: bool) -> list[Tensor]:
    """The result of four layers and every gradient, after several runs that reuse freed memory."""
    torch.manual_seed(0)
    device, found = torch.device("cuda"), []
    stack = nn.ModuleList(ShortcutLayer(CONFIG, 1) for _ in range(4)).to(device, torch.bfloat16)
    for name, value in (*stack.named_parameters(), *stack.named_buffers()):
        nn.init.zeros_(value) if "bias" in name else nn.init.normal_(value, std=0.05)
    group = dist.new_group([0])
    for layer in stack:
        layer.mlp.router.float()
        layer.mlp.dispatcher = AllToAllDispatcher(group, 0, streams)
        layer.mlp.num_chunks, layer.mlp.after_attention, layer.mlp.expert_stream = (
            chunks,
            after_attention,
            streams.experts,
        )
    x = torch.randn(4, 512, CONFIG.hidden_size, device=device, dtype=torch.bfloat16, requires_grad=True)
    angles = rotary_angles(torch.arange(512, device=device), CONFIG.qk_rope_head_dim, 1e4)
    for _ in range(5):
        stack.zero_grad()
        x.grad, y = None, x
        for layer in stack:
            y, _ = layer(y, angles)
        y.square().mean().backward()
        found = [y.detach(), x.grad, *(weight.grad for weight in stack.parameters())]
    return [one.cpu() for one in found if one is not None]


@pytest.mark.parametrize("after_attention", [False, True])
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("experts_stream", [False, True])
def test_streams_leave_results_bitwise_identical(experts_stream: bool, chunks: int, after_attention: bool) -> None:
    blocking = gradients(StreamContext(blocking=True), chunks, after_attention)
    on_side_stream = SideStreamContext(torch.device("cuda"), Cuda(), experts_stream)
    overlapped = gradients(on_side_stream, chunks, after_attention)
    assert all(torch.equal(one, other) for one, other in zip(blocking, overlapped, strict=True))
