"""One step's objective and its health metrics, against their definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from longcat.counts import flops_per_token
from longcat.documents import PADDING
from longcat.init import initialise
from longcat.model import LongCat
from longcat.moe import Router
from parallel.mesh import connect
from tests.support.running import PaddedSamples, numbers_by_end
from train.batches import Batch, BatchReader, label_counts
from train.compose import compose
from train.config import Config
from train.objective import objective
from train.run import build_state
from train.step import Stepper

OVERRIDES = [
    "model=debug",
    "model.vocab_size=61",
    "model.hidden_size=16",
    "train.sequence_length=12",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.dtype=float32",
    "balance.group_loss_weight=0.01",
    "balance.num_groups=2",
    "loss.hidden_z_weight=1e-3",
]


class Windows:
    """Random sequences that depend on the sample's index."""

    def __getitem__(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 61, 13)

    def with_documents(self, index: int) -> np.ndarray:
        return np.stack([self[index], numbers_by_end(self[index])])


def build(config: Config, samples: Any = None) -> Any:
    topology = connect(config.parallel)
    state = build_state(config, topology)
    reader = BatchReader(samples or Windows(), config, topology)
    return Stepper(state, reader, config, topology), reader, state


@pytest.fixture
def closing() -> Any:
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("closing")
def test_router_grad_ratio_equals_autograd_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """δ added to every token's R, separately where it weighs and where it balances: ∇_δ is ∇_P."""
    config = compose(OVERRIDES)
    stepper, reader, _ = build(config)
    ratio = stepper.step().metrics["router_grad_ratio"]

    model = LongCat(config.model, 2)
    initialise(model, config.model, config.train.seed)
    deltas: dict[int, tuple[Tensor, Tensor]] = {}
    plain = Router.forward

    def shifted(self: Router, u: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        zeros = [torch.zeros(config.model.num_routed, requires_grad=True) for _ in range(2)]
        weigh, balance = deltas.setdefault(id(self), (zeros[0], zeros[1]))
        probabilities, indices, gates = plain(self, u, padding)
        extra = (torch.zeros_like(probabilities) + weigh).gather(1, indices)
        return probabilities + balance, indices, gates + extra * config.model.routed_scaling_factor

    monkeypatch.setattr(Router, "forward", shifted)
    batches = list(reader.read(0))
    divisors = reader.divisors(batches)
    for batch in batches:
        losses = model(batch.tokens, batch.labels, batch.valid)
        objective(losses, divisors, config.loss, config.balance.group_loss_weight).backward()
    # P is the mean over a micro-batch's tokens, so a shift of every R by δ is a shift of P by δ
    ratios = [float(balance.grad.norm() / weigh.grad.norm()) for weigh, balance in deltas.values()]
    assert ratio == pytest.approx(max(ratios), rel=1e-4)


@pytest.mark.usefixtures("closing")
def test_mtp_switches_on_at_its_token_count() -> None:
    """48 tokens per step, on from 96 tokens: MTP is off in steps 1 and 2, and its weights do not change before."""
    config = compose([*OVERRIDES, "loss.mtp_start_tokens=96", "optim.weight_decay=0"])
    stepper, _, state = build(config)
    name = "mtp.layers.0.eh_proj.weight"
    seen = []
    weights = [dict(state.store.parameters)[name].full_tensor().clone()]
    for _ in range(3):
        seen.append(stepper.step().metrics["loss_mtp"])
        weights.append(dict(state.store.parameters)[name].full_tensor().clone())
    assert seen[:2] == [None, None]
    assert seen[2] == pytest.approx(np.log(61), rel=0.1)
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[2], weights[3])


@pytest.mark.usefixtures("closing")
def test_router_similarity_is_the_mean_pairwise_cosine() -> None:
    stepper, _, state = build(compose(OVERRIDES))
    expected = []
    for router in state.models[0].routers():
        rows = router.classifier.weight.full_tensor().detach()
        cosines = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
        expected.append(float(cosines[~torch.eye(len(rows), dtype=torch.bool)].mean()))
    found = stepper.step().metrics["router_similarity"]  # of the weights before the update
    assert found == pytest.approx(max(expected), abs=1e-6)


@pytest.mark.usefixtures("closing")
def test_micro_batch_size_does_not_change_the_gradient() -> None:
    """Without the balance loss (whose T is the micro-batch) one micro-batch of 4 equals four of 1."""
    norms = []
    for size in (4, 1):
        words = [*OVERRIDES, f"train.micro_batch_size={size}", "balance.group_loss_weight=0"]
        stepper, _, _ = build(compose(words))
        norms.append(stepper.step().metrics["grad_norm"])
        if size == 4:
            dist.destroy_process_group()
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


@pytest.mark.usefixtures("closing")
def test_labels_are_counted_before_the_backward() -> None:
    config = compose([*OVERRIDES, "data.mask_documents=true"])
    _, reader, _ = build(config)
    batches = list(reader.read(0))
    labels, mtp_labels = label_counts(batches, num_mtp_layers=1)
    assert labels == 4 * 12
    inside = sum(int((b.documents.numbers[:, 1:] == b.documents.numbers[:, :-1]).sum()) for b in batches)
    assert mtp_labels == inside


PACKED = [*OVERRIDES, "data.mask_documents=true", "data.packing=best_fit"]


@pytest.mark.usefixtures("closing")
def test_metrics_of_a_step_leave_out_padding() -> None:
    """Means are over the positions that hold text; `tokens` counts all positions, as stages and schedule do."""
    stepper, reader, _ = build(compose(PACKED), PaddedSamples(12, 61))
    config, batches = stepper.config, list(reader.read(0))
    padding = sum(int(batch.documents.padding.mask.sum()) for batch in batches)
    assert 0 < padding < 48
    labels, mtp_labels = label_counts([Batch(b.tokens, b.labels, b.valid, b.documents) for b in batches], 1)
    divisors = reader.divisors(batches)
    assert (divisors.valid_tokens, divisors.mtp_tokens, divisors.tokens) == (labels, mtp_labels, 48 - padding)

    model = LongCat(config.model, config.balance.num_groups)
    initialise(model, config.model, config.train.seed)
    norms = []
    for batch in batches:
        z, _ = model.trunk(batch.tokens, batch.documents)
        norms.append(torch.linalg.vector_norm(z[~batch.documents.padding.mask], dim=-1))
    result = stepper.step()
    assert result.metrics["tokens"] == 48 and result.metrics["padding_share"] == padding / 48
    assert result.metrics["hidden_norm"] == pytest.approx(float(torch.cat(norms).detach().mean()), rel=1e-5)
    assert result.counts.sum(1).tolist() == [config.model.top_k * (48 - padding)] * config.model.num_layers
    ffn = float(result.counts[:, : config.model.num_experts].sum())
    assert result.metrics["ffn_experts_per_token"] == ffn / config.model.num_layers / (48 - padding)
    assert result.num_tokens == 48 - padding


@pytest.mark.usefixtures("closing")
@pytest.mark.parametrize("words", [[], ["data.mask_documents=true"], PACKED[-2:]], ids=["plain", "masked", "packed"])
def test_flops_count_the_keys_that_tokens_attend_to(words: list[str]) -> None:
    """By a loop over pairs of positions; padding attends to nothing, and nothing to it."""
    stepper, reader, _ = build(compose([*OVERRIDES, *words]), PaddedSamples(12, 61) if len(words) == 2 else None)
    batches, pairs, tokens = list(reader.read(0)), 0, 0
    for batch in batches:
        numbers = torch.zeros_like(batch.tokens) if batch.documents is None else batch.documents.numbers
        for row in numbers.tolist():
            texts = [number for number in row if number != PADDING]
            tokens += len(texts)
            pairs += sum(texts[key] == texts[query] for query in range(len(texts)) for key in range(query + 1))
    divisors = reader.divisors(batches)
    assert (divisors.tokens, divisors.attended) == (tokens, pairs)
    metrics = stepper.step().metrics
    config, used = stepper.config.model, metrics["ffn_experts_per_token"]
    linear = flops_per_token(config, 12, used, mtp=True, keys=0.0)
    blocks = 2 * config.num_layers + config.num_mtp_layers
    each = 6 * blocks * config.num_heads * (config.qk_head_dim + config.v_head_dim)
    assert metrics["flops"] == pytest.approx(tokens * linear + pairs * each)
    if not words:
        assert metrics["flops"] == 48 * flops_per_token(config, 12, used, mtp=True)


@pytest.mark.usefixtures("closing")
@pytest.mark.parametrize("method", ["pid", "quantile"])
def test_ids_of_padding_change_no_bit(method: str) -> None:
    """Weights, biases and metrics after two steps are those of other ids in the padding."""
    found = []
    for pad in (3, 60):
        if found:
            dist.destroy_process_group()
        words = [*PACKED, f"balance.method={method}"]
        stepper, _, state = build(compose(words), PaddedSamples(12, 61, pad))
        metrics = [stepper.step().metrics for _ in range(2)]
        weights = [tensor.full_tensor().clone() for _, tensor in state.store.parameters]
        found.append((metrics, state.biases.clone(), weights))
    (metrics, biases, weights), (other_metrics, other_biases, other_weights) = found
    assert metrics == other_metrics and torch.equal(biases, other_biases)
    assert all(torch.equal(one, other) for one, other in zip(weights, other_weights, strict=True))
