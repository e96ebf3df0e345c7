"""The operators that a GPU runs in one pass: close to what a CPU runs, and the same attention and experts with them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import longcat.attention
import longcat.generation
from longcat.attention import LatentAttention
from longcat.ops import fusion, one_pass
from longcat.ops.attention import causal_attention
from longcat.ops.elementwise import (
    added_norm,
    joined_swiglu_backward,
    residual_sum,
    rms_norm,
    swiglu,
    swiglu_backward,
)
from longcat.ops.grouped import grouped_gated_linear
from longcat.ops.rotation import rotary
from longcat.ops.torch_internals import storage_key
from longcat.rope import rotary_angles
from train.compose import compose

DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


def assert_close(ours: tuple[Tensor, ...], wanted: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    """Within a few units in the last place of the largest number."""
    for one, other in zip(ours, wanted, strict=True):
        assert one.dtype is other.dtype and one.shape == other.shape
        limit = 16 * torch.finfo(dtype).eps * float(other.detach().abs().max())
        assert float((one.double() - other.double()).detach().abs().max()) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_swiglu_are_close_to_a_cpus(dtype: torch.dtype) -> None:
    x, gain, up, grad = draw(50, 40, seed=1, dtype=dtype), draw(40, seed=2), *draw(2, 50, 40, seed=3, dtype=dtype)
    out = rms_norm(x, gain, 1e-5)
    wanted = torch.autograd.grad(out, (x, gain), grad)
    ours, inverse = one_pass.norm_rows(x.detach(), gain.detach(), 1e-5)
    assert_close((ours, *one_pass.norm_rows_backward(grad, x.detach(), gain.detach(), inverse)), (out, *wanted), dtype)
    assert_close((one_pass.gate_rows(x, up),), (swiglu(x, up),), dtype)
    grads, activation = one_pass.gate_rows_backward(grad, x, up)
    assert_close((*grads.chunk(2, -1), activation), swiglu_backward(grad, x, up), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_of_a_sum_is_that_of_two_steps(dtype: torch.dtype, on_gpu: None) -> None:
    """The same bits as an addition and a norm, in results and gradients."""
    x, y, gain = draw(2, 9, 40, seed=1, dtype=dtype), draw(2, 9, 40, seed=2, dtype=dtype), draw(40, seed=3)
    grads = draw(2, 9, 40, seed=4, dtype=dtype), draw(2, 9, 40, seed=5, dtype=dtype)
    total = x + y
    wanted = total, rms_norm(total, gain, 1e-5)
    ours = added_norm(x, y, gain, 1e-5)
    for one, other in zip(ours, wanted, strict=True):
        assert torch.equal(one, other)
    inputs = x, y, gain
    pairs = zip(torch.autograd.grad(ours, inputs, grads), torch.autograd.grad(wanted, inputs, grads), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    layer_output = residual_sum(x, y, grads[0])
    assert torch.equal(layer_output, (x + y) + grads[0])
    assert layer_output._base is None, "FSDP2 warns of a module that returns a view"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rotation_is_close_to_a_cpus(dtype: torch.dtype) -> None:
    query, angles = draw(2, 9, 3, 20, seed=1, dtype=dtype), rotary_angles(torch.arange(9), 8, 1e4)
    wanted = torch.cat((query[..., :12], rotary(query[..., 12:], angles)), -1)
    turned = query.detach().clone()
    one_pass.rotate_(turned[..., 12:], angles)
    (back,) = torch.autograd.grad(wanted, query, turned)
    assert_close((turned, one_pass.rotate_back(turned, angles)), (wanted, back), dtype)


def test_exp_is_within_two_units_in_the_last_place() -> None:
    x = torch.cat((torch.linspace(*one_pass.EXP_RANGE, 200_000), torch.randn(100_000)))
    exact = x.double().exp()
    assert float(((one_pass._exp(x) - exact) / exact).abs().max()) <= 2 * 2.0**-23
    ends = one_pass.gate_rows(torch.tensor([[-1e4, -0.0, 1e4, float("inf"), float("nan")]]), torch.ones(1, 5))[0]
    assert float(ends[0].abs()) < 1e-30 and ends[1] == 0 and ends[2] == 1e4
    assert ends[3].isinf() and ends[4].isnan()


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU runs, by the plain versions; attention by the CPU's blocks, without the columns before values."""

    def attention(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        *rest, value_width = rest
        assert value.shape[-1] > value_width
        return causal_attention(query, key, value[..., -value_width:], *rest)

    monkeypatch.setattr(fusion, "is_on_gpu", lambda _: True)
    monkeypatch.setattr(longcat.attention, "causal_attention", attention)


def latent_attention(x: Tensor) -> tuple[Tensor, ...]:
    """Result and gradients of a latent attention that is the same each time."""
    config = compose(["model=tiny"]).model
    attention = LatentAttention(config)
    for number, parameter in enumerate(attention.parameters()):
        parameter.data = 0.2 * draw(*parameter.shape, seed=number).detach()
    angles = rotary_angles(torch.arange(x.shape[1]), config.qk_rope_head_dim, 1e4)
    out = attention(x, angles, None)
    return out, *torch.autograd.grad(out.square().sum(), [x, *attention.parameters()])


def test_attention_is_that_of_a_cpu(request: pytest.FixtureRequest) -> None:
    x = draw(2, 33, compose(["model=tiny"]).model.hidden_size, seed=50)
    wanted = latent_attention(x)
    request.getfixturevalue("on_gpu")
    for ours, theirs in zip(latent_attention(x), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.detach().abs().max()))


def test_cached_attention_is_that_of_whole_sequences(on_gpu: None) -> None:
    """Queries come rotated to both: to the prompt's attention and to that from cached latents."""
    config = compose(["model=tiny"]).model
    attention, x = LatentAttention(config), draw(1, 21, config.hidden_size, seed=50).detach()
    for number, parameter in enumerate(attention.parameters()):
        parameter.data = 0.2 * draw(*parameter.shape, seed=number).detach()
    angles = rotary_angles(torch.arange(21), config.qk_rope_head_dim, 1e4)
    with torch.no_grad():
        whole = attention(x, angles, None)
        longcat.generation.LatentCache(attention, 21, x)
        parts = [attention(x[:, one], angles[one], None) for one in (slice(0, 16), slice(16, 21))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def test_experts_are_those_of_a_cpu(request: pytest.FixtureRequest) -> None:
    gate_up, weight = draw(9, 16, seed=1), draw(2, 5, 8, seed=2)
    ends = torch.tensor([4, 9], dtype=torch.int32)

    def run() -> tuple[Tensor, ...]:
        out = grouped_gated_linear(gate_up, weight, ends)
        return out, *torch.autograd.grad(out.square().sum(), (gate_up, weight))

    wanted = run()
    request.getfixturevalue("on_gpu")
    assert_close(run(), wanted, torch.float32)
    grad, gate_up_rows = draw(9, 8, seed=3).detach(), gate_up.detach()
    joined, _ = joined_swiglu_backward(grad, gate_up_rows)
    parts = swiglu_backward(grad, *gate_up_rows.chunk(2, -1))
    assert torch.equal(joined, torch.cat(parts[:2], -1))
    assert storage_key(parts[0].untyped_storage()) == storage_key(parts[1].untyped_storage())  # nothing to join


@pytest.mark.parametrize("rows", [0, 3])
def test_a_rank_without_rows_has_gradients(rows: int, on_gpu: None) -> None:
    """Routing may send a rank no token at all."""
    grad, gate_up = draw(rows, 8, seed=1).detach(), draw(rows, 16, seed=2).detach()
    joined, x = joined_swiglu_backward(grad, gate_up)
    assert joined.shape == (rows, 16) and x.shape == (rows, 8)
