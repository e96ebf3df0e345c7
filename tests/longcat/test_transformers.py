"""Logits and gradients equal those of transformers' LongCat-Flash, an independent implementation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peer import peer_tensors
from longcat.config import ModelConfig
from longcat.model import LongCat
from longcat.names import logical_tensors
from longcat.rope import RopeScaling
from tests.longcat.peers import BASE, our_model, plain_peer, randomise

# B sequences, S positions, V vocabulary, K chosen, N FFN experts, Z identity experts

LOGIT_TOLERANCE = 2e-5  # of the largest logit
GRADIENT_TOLERANCE = 1e-4  # of the gradient's norm, tensor by tensor
SELECTION_GAP = 1e-5  # relative; below it two correct programs may choose different experts


@dataclass(frozen=True)
class Case:
    """One configuration: its changes to BASE, and the batch."""

    changes: dict[str, Any]
    batch: int = 2
    length: int = 12
    seed: int = 0

    @property
    def config(self) -> ModelConfig:
        return replace(BASE, **self.changes)


CASES = {
    "base": Case({}),
    "no_identity_experts": Case({"num_zero_experts": 0, "expected_ffn_experts": 3.0}),
    "more_identity_than_ffn_experts": Case({"num_experts": 4, "num_zero_experts": 9}),
    "one_chosen": Case({"top_k": 1, "expected_ffn_experts": 0.7}),
    "all_chosen": Case({"top_k": 9, "expected_ffn_experts": 6.0}),
    "one_ffn_expert": Case({"num_experts": 1, "top_k": 2, "expected_ffn_experts": 0.5}),
    "many_idle_experts": Case({"num_experts": 40, "num_zero_experts": 20}, batch=1, length=4),
    "odd_sizes": Case(
        {
            "vocab_size": 53,
            "hidden_size": 37,
            "num_heads": 3,
            "q_lora_rank": 11,
            "kv_lora_rank": 7,
            "qk_nope_head_dim": 5,
            "qk_rope_head_dim": 6,
            "v_head_dim": 9,
            "ffn_hidden_size": 41,
            "num_experts": 5,
            "num_zero_experts": 2,
            "expert_hidden_size": 13,
        },
        batch=3,
        length=7,
    ),
    "one_layer": Case({"num_layers": 1}),
    "one_head": Case({"num_heads": 1}),
    "one_sequence": Case({}, batch=1),
    "one_position": Case({}, batch=3, length=1),
    "long_sequence": Case({}, length=150),
    "low_rope_theta": Case({"rope_theta": 50.0}, length=24),
    "yarn": Case({"rope_scaling": RopeScaling(4, 16), "rope_theta": 50.0, "qk_rope_head_dim": 8}, length=40),
    "yarn_with_mscales": Case(
        {
            "rope_scaling": RopeScaling(10, 8, mscale=1.0, mscale_all_dim=0.8),
            "rope_theta": 20.0,
            "qk_rope_head_dim": 8,
        },
        length=40,
    ),
    "values_wider_than_keys": Case({"v_head_dim": 20, "qk_nope_head_dim": 6}),
    "rotary_wider_than_plain": Case({"qk_nope_head_dim": 2, "qk_rope_head_dim": 10}),
    "with_an_mtp_layer": Case({"num_mtp_layers": 1}),
}


class RoutingWatch:
    """Records every router's scores and biases of one forward of the peer."""

    def __init__(self, peer: nn.Module) -> None:
        self.scores: list[Tensor] = []
        self.biases: list[Tensor] = []
        for name, module in peer.named_modules():
            if name.endswith(".router"):
                module.register_forward_hook(self._record)

    def _record(self, module: Any, _inputs: Any, outputs: tuple[Tensor, ...]) -> None:
        self.scores.append(outputs[0].detach().softmax(-1))
        self.biases.append(module.e_score_correction_bias.detach())

    def check(self, top_k: int, has_choice: bool) -> None:
        """The biases change some selection, and no selection depends on rounding."""
        assert self.scores, "no router ran"
        if not has_choice:
            return
        changed = False
        for scores, bias in zip(self.scores, self.biases, strict=True):
            biased = scores + bias
            best = biased.topk(top_k + 1, dim=-1).values
            gap = (best[:, -2] - best[:, -1]) / best.abs().amax(-1)
            assert gap.min() > SELECTION_GAP, f"a selection depends on a gap of {gap.min():.1e}; take another seed"
            plain = scores.topk(top_k, dim=-1).indices.sort(-1).values
            changed |= bool((plain != biased.topk(top_k, dim=-1).indices.sort(-1).values).any())
        assert changed, "the biases change no selection, so this case does not test them"


def run_both(case: Case) -> tuple[Tensor, Tensor, nn.Module, LongCat]:
    """Logits [B, S, V] of (peer, ours), both with the gradients of the mean cross-entropy in place."""
    config = case.config
    peer = plain_peer(config)
    randomise(peer, config, case.seed)
    model = our_model(peer, config)
    generator = torch.Generator().manual_seed(case.seed + 1)
    sample = torch.randint(config.vocab_size, (case.batch, case.length + 1), generator=generator)
    tokens, labels = sample[:, :-1].contiguous(), sample[:, 1:].contiguous()

    watch = RoutingWatch(peer)
    peer_logits = peer(input_ids=tokens).logits
    watch.check(config.top_k, has_choice=config.top_k < config.num_routed)
    F.cross_entropy(peer_logits.flatten(0, 1), labels.flatten()).backward()

    logits = model.logits(tokens)
    losses = model(tokens, labels, torch.ones_like(labels, dtype=torch.bool))
    (losses.lm / labels.numel()).backward()
    return peer_logits.detach(), logits.detach(), peer, model


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_transformers(name: str) -> None:
    case = CASES[name]
    expected, got, peer, model = run_both(case)

    difference = (got - expected).abs().max() / expected.abs().max()
    assert difference <= LOGIT_TOLERANCE, f"logits differ by {difference:.2e} of the largest"

    wanted = dict(peer_tensors(peer, case.config, grads=True))
    ours = {n: g for n, g in logical_tensors(model, grads=True) if not n.startswith("model.mtp.")}
    assert not ours.keys() - wanted.keys(), "gradients that the peer lacks"
    total = torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    assert total > 0
    wrong = {}
    for tensor_name, reference in wanted.items():
        gradient = ours.get(tensor_name, torch.zeros_like(reference))
        # With one position the queries' gradient is zero, so its rounding is compared with the total gradient.
        scale = torch.maximum(reference.norm(), 1e-5 * total)
        error = ((gradient - reference).norm() / scale).item()
        if not error <= GRADIENT_TOLERANCE:
            wrong[tensor_name] = error
    assert not wrong, f"gradients that differ, with their relative errors: {wrong}"


def test_mtp_layer_gets_no_gradient_from_the_language_loss() -> None:
    *_, model = run_both(CASES["with_an_mtp_layer"])
    assert any(name.startswith("model.mtp.") for name, _ in logical_tensors(model))
    own = {n: g for n, g in logical_tensors(model, grads=True) if n.startswith("model.mtp.")}
    assert all(not gradient.any() for gradient in own.values())
