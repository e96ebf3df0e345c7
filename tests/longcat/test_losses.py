"""Every loss equals that of a slow float64 reference written from the equations, and so does its gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longcat.config import ModelConfig
from longcat.model import LongCat, Losses
from longcat.names import logical_tensors
from tests.longcat.reference import Reference, Routing, balance, hidden_z

TOLERANCE = 2e-5  # relative, of float32 sums

BASE = ModelConfig(
    name="losses",
    vocab_size=29,
    num_layers=2,
    hidden_size=24,
    num_heads=2,
    q_lora_rank=10,
    kv_lora_rank=6,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=7,
    ffn_hidden_size=20,
    num_experts=6,
    num_zero_experts=3,
    top_k=3,
    expected_ffn_experts=2.0,
    expert_hidden_size=11,
    routed_scaling_factor=2.5,
    num_mtp_layers=1,
    rope_theta=1e4,
)


@dataclass(frozen=True)
class Case:
    """Changes to BASE, the number of groups of the balance loss, and the valid labels."""

    changes: dict[str, Any] = field(default_factory=dict)
    num_groups: int = 1
    every_label: bool = True

    @property
    def config(self) -> ModelConfig:
        return replace(BASE, **self.changes)


CASES = {
    "base": Case(),
    "two_groups": Case(num_groups=2),
    "a_group_for_each_expert": Case(num_groups=6),
    "labels_left_out": Case(every_label=False),
    "no_identity_experts": Case({"num_zero_experts": 0, "expected_ffn_experts": 3.0}, num_groups=3),
    "identity_experts_not_expected": Case({"expected_ffn_experts": 3.0}, num_groups=2),
    "uneven_budget": Case({"top_k": 5, "expected_ffn_experts": 3.5}, num_groups=3),
    "two_prediction_layers": Case({"num_mtp_layers": 2}, every_label=False),
    "no_prediction_layer": Case({"num_mtp_layers": 0}),
}


@torch.no_grad()
def decided_model(case: Case) -> LongCat:
    """A model with gains off one, clear router scores and biases that matter."""
    model = LongCat(case.config, balance_groups=case.num_groups)
    generator = torch.Generator().manual_seed(3)
    for name, tensor in logical_tensors(model):
        values = torch.randn(tensor.shape, generator=generator)
        if name.endswith("bias"):
            tensor.copy_(values / case.config.num_routed)
        elif tensor.dim() == 1:
            tensor.copy_(1 + 0.2 * values)
        else:
            spread = 1.5 if "classifier" in name else 1.0
            tensor.copy_(values * spread / tensor.shape[-1] ** 0.5)
    return model


def batch(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """tokens, labels, valid [2, 7]."""
    generator = torch.Generator().manual_seed(5)
    sample = torch.randint(case.config.vocab_size, (2, 8), generator=generator)
    valid = torch.ones(2, 7, dtype=torch.bool)
    if not case.every_label:
        valid[0, 2] = valid[1, 0] = valid[1, 6] = False
    return sample[:, :-1].contiguous(), sample[:, 1:].contiguous(), valid


def reference_losses(
    case: Case, reference: Reference, tokens: Tensor, labels: Tensor, valid: Tensor
) -> tuple[dict[str, Tensor], list[list[Routing]]]:
    """The reference's sums over the micro-batch, and each layer's routing."""
    forwards = [reference.forward(row) for row in tokens]
    layers = [[one.routing[number] for one in forwards] for number in range(case.config.num_layers)]
    rows = list(zip(forwards, labels, valid, strict=True))
    sums = {
        "lm": [reference.language_loss(one.z, label, counted) for one, label, counted in rows],
        "mtp": [reference.prediction_loss(one.z, label, counted) for one, label, counted in rows],
        "hidden_z": [hidden_z(one.z) for one in forwards],
        "balance": [balance(case.config, layers, case.num_groups)],
    }
    return {name: torch.stack(terms).sum() for name, terms in sums.items()}, layers


@pytest.mark.parametrize("name", CASES)
def test_losses_equal_the_reference(name: str) -> None:
    case = CASES[name]
    model = decided_model(case)
    tokens, labels, valid = batch(case)
    reference = Reference(case.config, dict(logical_tensors(model)))
    expected, layers = reference_losses(case, reference, tokens, labels, valid)
    losses = model(tokens, labels, valid)
    for loss, value in expected.items():
        got = getattr(losses, loss).item()
        assert got == pytest.approx(value.item(), rel=TOLERANCE, abs=1e-12), loss
    assert (losses.mtp.item() > 0) == (case.config.num_mtp_layers > 0)
    check_counts(case.config, losses, layers)


def check_counts(config: ModelConfig, losses: Losses, layers: list[list[Routing]]) -> None:
    """Selections of each expert, and FFN experts of each token, are the reference's."""
    for number, sequences in enumerate(layers):
        picks = [[e for chosen in routing.chosen for e in chosen] for routing in sequences]
        flat = torch.tensor([e for sequence in picks for e in sequence])
        assert torch.equal(losses.counts[number], torch.bincount(flat, minlength=config.num_routed))
        ffn = [[sum(e < config.num_experts for e in chosen) for chosen in one.chosen] for one in sequences]
        assert losses.ffn_experts[number].tolist() == ffn


LOSSES: dict[str, Callable[[Losses], Tensor]] = {
    "mtp": lambda losses: losses.mtp,
    "balance": lambda losses: losses.balance,
    "hidden_z": lambda losses: losses.hidden_z,
}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["two_groups", "two_prediction_layers", "no_identity_experts"])
def test_gradients_of_the_losses_equal_the_reference(name: str, loss: str) -> None:
    case = CASES[name]
    model = decided_model(case)
    tokens, labels, valid = batch(case)
    reference = Reference(case.config, dict(logical_tensors(model)))
    for tensor in reference.tensors.values():
        tensor.requires_grad_()
    expected, _ = reference_losses(case, reference, tokens, labels, valid)
    expected[loss].backward()
    LOSSES[loss](model(tokens, labels, valid)).backward()

    ours = dict(logical_tensors(model, grads=True))
    wanted = {n: t.grad for n, t in reference.tensors.items() if t.grad is not None and t.grad.any()}
    assert wanted, "this loss has no gradient"
    total = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    wrong = {}
    for tensor_name, gradient in ours.items():
        target = wanted.pop(tensor_name, torch.zeros_like(gradient, dtype=torch.float64))
        scale = torch.maximum(target.norm(), 1e-3 * total)
        error = ((gradient.double() - target).norm() / scale).item()
        if not error <= 1e-4:
            wrong[tensor_name] = error
    assert not wrong and not wanted, f"differ: {wrong}; missing here: {sorted(wanted)}"


def test_chunks_of_the_head_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["labels_left_out"]
    results = []
    for rows in (256, 3):  # all 14 tokens at once; then 3, with 2 left over
        monkeypatch.setattr("longcat.ops.cross_entropy.chunk_rows", lambda _, rows=rows: rows)
        model = decided_model(case)
        losses = model(*batch(case))
        (losses.lm + losses.mtp).backward()
        gradients = dict(logical_tensors(model, grads=True))
        results.append((losses.lm, gradients["lm_head.weight"], gradients["model.layers.0.mlps.0.up_proj.weight"]))
    for full, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, full, rtol=1e-5, atol=1e-6)
