"""Each operator with a backward of its own against plain torch expressions and torch's autograd.

In float64 and float32.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import silu

from longcat.documents import Documents
from longcat.ops.attention import causal_attention
from longcat.ops.cross_entropy import linear_cross_entropy
from longcat.ops.elementwise import rms_norm
from longcat.ops.grouped import grouped_gated_linear, grouped_linear
from longcat.ops.matmul import cpu_multiplies_bfloat16, gated_linear, linear, product
from longcat.ops.permute import combine, log_gates, permute, plan_permutation
from longcat.ops.rotation import rotary
from longcat.rope import rotary_angles


def draw(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, requires_grad=True)


def assert_same(ours: Tensor, reference: Tensor, inputs: list[Tensor], tolerance: float = 2e-5) -> None:
    """Values and the gradients of every input agree, for one random upstream gradient."""
    torch.testing.assert_close(ours, reference, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(99))
    got = torch.autograd.grad(ours, inputs, upstream.to(ours.dtype))
    wanted = torch.autograd.grad(reference, inputs, upstream.to(reference.dtype))
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_linear() -> None:
    x, weight = draw(0, 2, 3, 5), draw(1, 7, 5)
    assert_same(linear(x, weight), torch.nn.functional.linear(x, weight), [x, weight])


@pytest.mark.parametrize("width,height", [(8, 12), (5, 7), (8, 7)], ids=["aligned", "odd", "odd_output"])
@pytest.mark.parametrize("counts", [[3, 0, 2], [0, 0, 0], [0, 4, 0]], ids=["some_empty", "no_rows", "one"])
def test_grouped_linear(width: int, height: int, counts: list[int]) -> None:
    x, weight = draw(0, sum(counts), width), draw(1, 3, height, width)
    parts = torch.split(x, counts)
    reference = torch.cat([part @ w.t() for part, w in zip(parts, weight, strict=True)])
    ends = torch.tensor(counts).cumsum(0).to(torch.int32)
    assert_same(grouped_linear(x, weight, ends), reference, [x, weight])


def test_bfloat16_product_is_rounded_once() -> None:
    """Both on processors with bfloat16 instructions and without: float32 accumulation, one rounding."""
    a, b = draw(0, 33, 500).detach().bfloat16(), draw(1, 500, 17).detach().bfloat16()
    exact = (a.double() @ b.double()).float()
    error = (product(a, b).float() - exact).abs() / exact.abs().clamp_min(1.0)
    assert product(a, b).dtype is torch.bfloat16
    assert float(error.max()) < 2**-8 * 1.01
    assert isinstance(cpu_multiplies_bfloat16(), bool)


def test_rms_norm() -> None:
    x, gain = draw(0, 4, 9), draw(1, 9)
    reference = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * gain
    assert_same(rms_norm(x, gain, 1e-5), reference, [x, gain])


@pytest.mark.parametrize("width", [8, 5], ids=["aligned", "odd"])
def test_gated_products_save_only_gate_and_up(width: int) -> None:
    """silu(gate) · up by a matrix, or by each expert's: the product's input is recomputed, not saved."""
    gate, up, one, several = draw(0, 4, width), draw(1, 4, width), draw(2, 7, width), draw(3, 2, 7, width)

    def x() -> Tensor:
        return silu(gate) * up

    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        ours = gated_linear(gate, up, one)
    assert saved == [one.data_ptr(), gate.data_ptr(), up.data_ptr()]
    assert_same(ours, x() @ one.t(), [gate, up, one])
    ends = torch.tensor([3, 4], dtype=torch.int32)
    reference = torch.cat((x()[:3] @ several[0].t(), x()[3:] @ several[1].t()))
    assert_same(grouped_gated_linear(torch.cat((gate, up), -1), several, ends), reference, [gate, up, several])
    fixed = gate.detach(), up.detach()
    assert_same(gated_linear(*fixed, one), x().detach() @ one.t(), [one])
    assert_same(gated_linear(fixed[0], up, one), x() @ one.t(), [up, one])
    both = torch.cat((gate, up), -1)
    assert_same(grouped_gated_linear(both, several[:1].detach(), ends[1:]), x() @ several[0].detach().t(), [gate, up])
    of_weight = x().detach()[:, None].mT @ torch.ones(4, 1, 7)
    grouped_gated_linear(both.detach(), several[:1], ends[1:]).sum().backward()
    assert several.grad is not None
    torch.testing.assert_close(several.grad[0], of_weight.sum(0).t(), rtol=1e-5, atol=1e-6)


def test_rotary_turns_interleaved_pairs() -> None:
    x = draw(0, 2, 5, 3, 8)
    angles = rotary_angles(torch.arange(5), 8, 1e4)
    position = torch.arange(5.0)[:, None, None]
    theta = position / 1e4 ** (torch.arange(0, 8, 2) / 8)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = (even * theta.cos() - odd * theta.sin(), even * theta.sin() + odd * theta.cos())
    assert_same(rotary(x, angles), torch.stack(turned, -1).flatten(-2), [x])


@pytest.mark.parametrize("length", [1, 7, 128, 129, 300, 1100])
@pytest.mark.parametrize("masked", [False, True], ids=["one_document", "documents"])
@pytest.mark.parametrize("parts", [False, True], ids=["one_pass", "blocks_of_queries"])
def test_causal_attention(length: int, masked: bool, parts: bool) -> None:
    """The ranges leave out the first queries, some in the middle, and the last, whose keys then get no gradient."""
    query, key, value = draw(0, 2, length, 3, 6), draw(1, 2, length, 3, 6), draw(2, 2, length, 3, 4)
    documents = Documents.of(torch.randint(0, 2, (2, length)).cumsum(1) // 8) if masked else None
    runs = [(length // 9, length // 3 + 1), (length // 2 + 1, length - length // 7)] if parts and length > 2 else None
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    if documents is not None:
        hidden = hidden | (documents.numbers[:, :, None] != documents.numbers[:, None, :])[:, None]
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    reference = (torch.softmax((q @ k.mT * 0.3).masked_fill(hidden, float("-inf")), -1) @ v).transpose(1, 2)
    held = torch.cat([torch.arange(*run) for run in runs or [(0, length)]])
    ours, reference = causal_attention(query[:, held], key, value, 0.3, documents, runs), reference[:, held]
    assert_same(ours, reference, [query, key, value])


def test_causal_attention_recomputes_long_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saved or recomputed, the gradients are bitwise identical; recomputed, nothing of size S² is saved."""
    inputs = [draw(0, 2, 200, 3, 6), draw(1, 2, 200, 3, 6), draw(2, 2, 200, 3, 4)]
    results, sizes = [], []
    for limit in (200 * 4, 200 * 4 - 1):
        monkeypatch.setattr("longcat.ops.attention.MAX_SAVED_ROW_BYTES", limit)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, to=saved: to.append(t.numel()) or t, lambda t: t):
            out = causal_attention(*inputs, 0.3, None)
        results.append(torch.autograd.grad(out.square().sum(), inputs))
        sizes.append(sum(saved))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert sizes[0] - sizes[1] == 6 * (128 * 128 + 72 * 200)


@pytest.mark.parametrize("rows", [256, 3], ids=["one_chunk", "many_chunks"])
def test_linear_cross_entropy(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longcat.ops.cross_entropy.chunk_rows", lambda _: rows)
    hidden, weight = draw(0, 11, 6), draw(1, 13, 6)
    labels = torch.arange(11)
    valid = torch.arange(11) % 3 != 0
    each = torch.nn.functional.cross_entropy(hidden @ weight.t(), labels, reduction="none")
    total, losses = linear_cross_entropy(hidden, weight, labels, valid)
    torch.testing.assert_close(losses, torch.where(valid, each, 0.0).detach())
    assert_same(total, each[valid].sum(), [hidden, weight])


@given(tokens=st.integers(1, 9), experts=st.integers(1, 5), zero=st.integers(0, 4), seed=st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_permute_and_combine_equal_a_loop_over_tokens(tokens: int, experts: int, zero: int, seed: int) -> None:
    """Any routing: no FFN expert, only FFN experts, empty experts."""
    generator = torch.Generator().manual_seed(seed)
    top_k = int(torch.randint(1, experts + zero + 1, (), generator=generator))
    scores = torch.rand(tokens, experts + zero, generator=generator)
    indices = scores.topk(top_k).indices
    x, gates = draw(seed + 1, tokens, 3), draw(seed + 2, tokens, top_k)
    into, back = draw(seed + 3, experts, 8, 3), draw(seed + 4, experts, 3, 4)
    plain = plan_permutation(indices, experts, experts + zero)
    assert plain.counts.tolist() == torch.bincount(indices.flatten(), minlength=experts + zero).tolist()

    def result(expert: int, row: Tensor) -> Tensor:
        if expert >= experts:
            return row
        gate, up = (into[expert] @ row).chunk(2)
        return back[expert] @ (silu(gate) * up)

    def of_token(token: int) -> Tensor:
        return sum(
            (gates[token, choice] * result(expert, x[token]) for choice, expert in enumerate(indices[token].tolist())),
            torch.zeros(3),
        )

    has_rows = bool((plain.row_index >= 0).any())
    most = int(plain.counts[:experts].max())
    for plan in (plain, plain.pad_to_capacity(most + 1, experts)) if has_rows else (plain,):
        reference = torch.stack([of_token(token) for token in range(tokens)])
        ends = plan.counts[:experts].cumsum(0).to(torch.int32)
        hidden = grouped_linear(permute(x, plan), into, ends)
        results = grouped_gated_linear(hidden, back, ends, log_scale=log_gates(gates, plan, x.dtype))
        ours = combine(results, gates, plan, x)
        torch.testing.assert_close(ours, reference)
        if has_rows:
            assert_same(ours, reference, [x, gates, into, back])


def test_a_gate_of_zero_has_no_gradient() -> None:
    """Its logarithm has none; a softmax that selects it gives more than zero."""
    plan = plan_permutation(torch.tensor([[0, 1]]), 2, 2)
    gates = torch.tensor([[0.0, 2.0]], requires_grad=True)
    log_gates(gates, plan, torch.float32).backward(torch.tensor([5.0, 3.0]))
    assert gates.grad is not None and gates.grad.tolist() == [[0.0, 1.5]]
