"""Padding at the end of a sequence: losses, gradients and selections are those of the sequence without it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longcat.config import ModelConfig
from longcat.documents import PADDING, Documents
from longcat.init import initialise
from longcat.model import LongCat, Losses
from longcat.ops.selections import count_margins

BASE = ModelConfig(
    num_layers=2,
    hidden_size=16,
    vocab_size=31,
    num_experts=6,
    num_zero_experts=3,
    top_k=3,
    expected_ffn_experts=2.0,
    expert_hidden_size=8,
    ffn_hidden_size=16,
    num_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=4,
    num_mtp_layers=1,
    hidden_std=0.3,
)
TEXT, LENGTH = 11, 16
CHANGES: dict[str, dict[str, Any]] = {
    "identity_experts": {},
    "fewer_identity_experts_than_choices": {"num_zero_experts": 1, "expected_ffn_experts": 2.5},
    "no_identity_experts": {"num_zero_experts": 0, "expected_ffn_experts": 3.0},
}


def losses_of(model: LongCat, numbers: Tensor, ids: Tensor, may_pad: bool) -> Losses:
    """Of numbers and ids [1, length + 1]; labels that leave their document do not count."""
    inside = (numbers[:, 1:] == numbers[:, :-1]) & (numbers[:, 1:] != PADDING)
    documents = Documents.of(numbers[:, :-1].contiguous(), may_pad=may_pad)
    losses: Losses = model(ids[:, :-1], ids[:, 1:].contiguous(), inside, documents)
    return losses


def margins_of(model: LongCat) -> list[Tensor]:
    """The histograms that the backward counts."""
    found = []
    for router in model.routers():
        assert router.margins is not None
        found.append(router.margins)
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_a_padded_sequence_is_the_sequence_without_padding(name: str) -> None:
    config = replace(BASE, **CHANGES[name])
    counts_margins = config.top_k < config.num_routed
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(config.vocab_size, (1, LENGTH + 1), generator=generator)
    numbers = torch.tensor([[0] * 4 + [1] * (TEXT - 4) + [PADDING] * (LENGTH + 1 - TEXT)])
    results = []
    for length in (LENGTH, TEXT):
        model = LongCat(config, balance_groups=2)
        initialise(model, config, 0)
        for router in model.routers():
            router.probability_grad = torch.zeros(config.num_routed)
            router.margins = torch.zeros(config.num_routed, 64, dtype=torch.int64) if counts_margins else None
        losses = losses_of(model, numbers[:, : length + 1], ids[:, : length + 1], may_pad=length == LENGTH)
        (losses.lm + losses.mtp + losses.balance + 0.1 * losses.hidden_z).backward()
        gradients = {key: weight.grad for key, weight in model.named_parameters()}
        results.append((losses, gradients, model))
    (padded, gradients, model), (plain, expected, other) = results
    for key in ("lm", "mtp", "balance", "hidden_z", "hidden_norm", "balance_grad"):
        torch.testing.assert_close(getattr(padded, key), getattr(plain, key), rtol=1e-5, atol=1e-6)
    assert torch.equal(padded.counts, plain.counts)
    assert padded.counts.sum(1).tolist() == [config.top_k * TEXT] * config.num_layers
    assert torch.equal(padded.ffn_experts[:, :, :TEXT], plain.ffn_experts)
    assert not padded.ffn_experts[:, :, TEXT:].any(), "padding has no FFN expert"
    assert not padded.token_losses[:, TEXT - 1 :].any()
    total = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for key, gradient in gradients.items():
        scale = torch.maximum(expected[key].norm(), 1e-3 * total)
        assert (gradient - expected[key]).norm() <= 1e-4 * scale, key
    for one, two in zip(model.routers(), other.routers(), strict=True):
        torch.testing.assert_close(one.probability_grad, two.probability_grad, rtol=1e-4, atol=1e-6)
    if counts_margins:
        pairs = zip(margins_of(model), margins_of(other), strict=True)
        assert all(torch.equal(one, two) and one.any() for one, two in pairs)


def test_margins_of_padding_are_not_counted() -> None:
    probabilities = torch.softmax(torch.randn(40, 9, generator=torch.Generator().manual_seed(1)), -1)
    padding = torch.arange(40) % 3 == 0
    bias = torch.linspace(-0.1, 0.1, 9)
    expected = count_margins(probabilities[~padding], bias, 3, 32)
    assert torch.equal(count_margins(probabilities, bias, 3, 32, padding), expected)
