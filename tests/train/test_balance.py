"""Bias control: the report's rule to the letter, and the compute budget on a recorded routing problem."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from longcat.ops.selections import count_margins, margin_edges
from train.balance import BalanceConfig, build_controller
from train.compose import compose
from train.huggingface.import_folder import controller_state

MODEL = ModelConfig(num_layers=1, num_experts=8, num_zero_experts=4, top_k=3, expected_ffn_experts=2)  # debug
TARGET = 2 / 3 / 8  # the share of all selections that each FFN expert should get
BAND = 0.01
NONE = torch.zeros(1, MODEL.num_routed, 0, dtype=torch.int64)  # margins


def recorded_scores() -> Tensor:
    """[T, N+Z] router scores of a real run (see record_routing.py for where they come from)."""
    scores = torch.from_numpy(np.load(Path(__file__).with_name("recorded_routing.npz"))["scores"])
    return scores.flatten(0, 1).float()


def control(config: BalanceConfig, steps: int) -> tuple[list[float], Tensor]:
    """Run the controller in closed loop on all recorded scores in each step.

    Returns the mean FFN experts per token at each step, and the last step's counts.
    """
    controller = build_controller(config, MODEL)
    scores = recorded_scores()
    bias = torch.zeros(1, MODEL.num_routed)
    used = []
    counts = torch.zeros(1, MODEL.num_routed, dtype=torch.int64)
    for _ in range(steps):
        chosen = torch.topk(scores + bias, MODEL.top_k, -1).indices
        counts = torch.bincount(chosen.flatten(), minlength=MODEL.num_routed)[None]
        used.append(float(counts[:, : MODEL.num_experts].sum()) / scores.shape[0])
        bins = controller.margin_bins
        bias = controller.update(counts, count_margins(scores, bias[0], MODEL.top_k, bins)[None] if bins else NONE)
    return used, counts


def settled_after(used: list[float]) -> int:
    """The first step from which the budget stays inside the 1 % band."""
    outside = [step for step, value in enumerate(used) if abs(value / MODEL.expected_ffn_experts - 1) > BAND]
    return outside[-1] + 1 if outside else 0


def overshoots(used: list[float]) -> int:
    """The number of excursions beyond the band on the side opposite to the start."""
    errors = [value / MODEL.expected_ffn_experts - 1 for value in used]
    side = 1 if errors[0] > 0 else -1
    beyond = [-side * error > BAND for error in errors]
    return sum(now and not before for before, now in zip([False, *beyond], beyond, strict=False))


def test_integral_term_alone_is_the_report_s_rule() -> None:
    controller = build_controller(BalanceConfig(kp=0, ki=0.3, kd=0, decay=0, smoothing=0), MODEL)
    generator = torch.Generator().manual_seed(0)
    expected = torch.zeros(MODEL.num_routed, dtype=torch.float64)
    for _ in range(5):
        counts = torch.randint(0, 100, (1, MODEL.num_routed), generator=generator)
        total = int(counts.sum())  # K·T_all
        for expert in range(MODEL.num_experts):
            expected[expert] += 0.3 * (TARGET - int(counts[0, expert]) / total)
        bias = controller.update(counts, NONE)
        torch.testing.assert_close(bias[0], expected.float())
        assert torch.equal(bias[0, MODEL.num_experts :], torch.zeros(MODEL.num_zero_experts))


@pytest.mark.parametrize("smoothing", [0.0, 0.75])
def test_each_term_of_the_pid(smoothing: float) -> None:
    """Proportional and derivative terms act on the (filtered) error and its change; the first step has no change."""
    parts = BalanceConfig(kp=2.0, ki=0.0, kd=0.5, decay=0, smoothing=smoothing)
    controller = build_controller(parts, MODEL)
    even = torch.full((1, MODEL.num_routed), 10)
    skewed = even.clone()
    skewed[0, 0] = 34
    total = 10 * MODEL.num_routed
    first, raw = TARGET - 10 / total, TARGET - 34 / (total + 24)
    second = smoothing * first + (1 - smoothing) * raw
    assert float(controller.update(even, NONE)[0, 0]) == pytest.approx(2.0 * first)
    assert float(controller.update(skewed, NONE)[0, 0]) == pytest.approx(2.0 * second + 0.5 * (second - first))


def test_decay_shrinks_every_gain() -> None:
    counts = torch.zeros(1, MODEL.num_routed, dtype=torch.int64)
    counts[0, 0] = 240
    controller = build_controller(BalanceConfig(kp=0, ki=1.0, kd=0, decay=1.0, smoothing=0), MODEL)
    total = 0.0
    for step in range(4):
        total += (TARGET - 1) / (1 + step)
        assert float(controller.update(counts, NONE)[0, 0]) == pytest.approx(total)


def test_sign_rule_moves_every_bias_equally() -> None:
    counts = torch.full((1, MODEL.num_routed), 10)
    counts[0, 0] = 100
    bias = build_controller(BalanceConfig(method="sign", ki=0.01, decay=0), MODEL).update(counts, NONE)
    assert float(bias[0, 0]) == pytest.approx(-0.01)
    assert torch.allclose(bias[0, 1 : MODEL.num_experts], torch.tensor(0.01))
    assert torch.equal(bias[0, MODEL.num_experts :], torch.zeros(MODEL.num_zero_experts))


def test_margins_below_zero_are_the_selections() -> None:
    probabilities = torch.rand(50, 6, generator=torch.Generator().manual_seed(1)).softmax(-1)
    bias = torch.tensor([0.02, -0.02, 0.0, 0.04, 0.01, 0.0])
    counts, edges = count_margins(probabilities, bias, 2, 400), margin_edges(6, 400)
    assert edges[0] == pytest.approx(-4.0) and edges[-1] == pytest.approx(4.0) and bool((edges.diff() > 0).all())
    ordered = (probabilities + bias).sort(-1, descending=True)
    selected = torch.bincount(ordered.indices[:, :2].flatten(), minlength=6)
    margins = (ordered.values[:, 2:3] - (probabilities + bias)).double()
    assert torch.equal(counts[:, :200].sum(1), selected) and 0 < int(selected.min()) < int(selected.max()) < 50
    for expert in range(6):
        places = torch.searchsorted(edges, margins[:, expert].contiguous(), right=True) - 1
        assert (counts[expert] - torch.bincount(places, minlength=400)).abs().sum() <= 2, "one at an edge may differ"


@pytest.mark.parametrize(
    ("experts", "identity", "top_k", "wanted"), [(16, 8, 6, 4.0), (64, 0, 4, 4.0), (512, 256, 12, 8.0)]
)
def test_quantiles_reach_every_share_in_few_steps(experts: int, identity: int, top_k: int, wanted: float) -> None:
    """Also where bins must be finer than the mean probability; what is left is the chance of a batch of tokens."""
    model = ModelConfig(
        num_layers=1, num_experts=experts, num_zero_experts=identity, top_k=top_k, expected_ffn_experts=wanted
    )
    controller = build_controller(BalanceConfig(method="quantile"), model)
    generator = torch.Generator().manual_seed(0)
    offsets = torch.randn(model.num_routed, generator=generator)
    bias, tokens = torch.zeros(1, model.num_routed), 2048
    violations = []
    for _ in range(5):
        probabilities = (torch.randn(tokens, model.num_routed, generator=generator) + offsets).softmax(-1)
        chosen = torch.topk(probabilities + bias, top_k, -1).indices
        counts = torch.bincount(chosen.flatten(), minlength=model.num_routed)[None]
        shares = [wanted / experts] * experts + [(top_k - wanted) / max(identity, 1)] * identity
        violations.append(float((counts[0] / (tokens * torch.tensor(shares))).max()) - 1)
        used = float(counts[:, :experts].sum()) / tokens
        bias = controller.update(counts, count_margins(probabilities, bias[0], top_k, controller.margin_bins)[None])
    chance = 5 / (tokens * wanted / experts) ** 0.5  # five standard deviations of an expert's load
    assert violations[0] > 2 and violations[-1] < 0.1 + chance
    assert abs(used / wanted - 1) < 0.02
    if identity:
        assert float(bias[0, experts:].mean()) == pytest.approx(0.0, abs=1e-7)


def test_quantiles_reach_the_budget_on_recorded_scores() -> None:
    used, counts = control(BalanceConfig(method="quantile"), 20)
    ffn = counts[0, : MODEL.num_experts]
    assert settled_after(used) <= 2
    assert float(ffn.max() / ffn.double().mean()) < 1.001


@pytest.mark.parametrize("wanted", [3.0, 2.0])
def test_quantiles_stay_bounded_at_shares_of_none_and_all(wanted: float) -> None:
    """No token should select an identity expert (K_e = K), or each token all FFN experts (K_e = N)."""
    model = ModelConfig(num_layers=1, num_experts=int(wanted) * (wanted == 2) or 8, num_zero_experts=4, top_k=3)
    model.expected_ffn_experts = wanted
    controller = build_controller(BalanceConfig(method="quantile"), model)
    generator = torch.Generator().manual_seed(0)
    probabilities = (torch.randn(500, model.num_routed, generator=generator)).softmax(-1)
    bias = torch.zeros(1, model.num_routed)
    ranges = []
    for _ in range(60):
        margins = count_margins(probabilities, bias[0], model.top_k, controller.margin_bins)[None]
        bias = controller.update(margins.sum(2), margins)
        ranges.append(float(bias.max() - bias.min()))
    assert ranges[-1] < 2.5 and ranges[-1] <= max(ranges[:20]) * 1.5


def test_quantiles_need_an_expert_that_is_not_selected() -> None:
    model = ModelConfig(num_layers=1, num_experts=2, num_zero_experts=1, top_k=3, expected_ffn_experts=2)
    with pytest.raises(ConfigError, match=r"needs more experts than model\.top_k=3"):
        build_controller(BalanceConfig(method="quantile"), model)


def test_pid_reaches_the_budget_before_the_integral_term() -> None:
    """On the recorded problem the quick start's gains settle before any integral gain alone, passing at most once."""
    pid = compose(["experiment=quickstart"]).balance
    with_pid, counts = control(pid, 100)
    alone = {
        (smoothing, ki): settled_after(control(BalanceConfig(ki=ki, smoothing=smoothing), 100)[0])
        for smoothing in (0.0, pid.smoothing)
        for ki in (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0)
    }
    steps = settled_after(with_pid)
    print(f"steps to the 1 % band: PID {steps}; integral part alone, by (smoothing, ki): {alone}")
    assert abs(with_pid[0] / MODEL.expected_ffn_experts - 1) > 40 * BAND, "the recorded scores already meet the budget"
    assert steps <= 20
    assert steps < alone[pid.smoothing, pid.ki]
    assert steps < min(alone.values())
    assert overshoots(with_pid) <= 1
    ffn = counts[0, : MODEL.num_experts].double()
    assert float(ffn.max() / ffn.mean()) < 1.1, "the budget is met but single experts are not balanced"


@pytest.mark.parametrize("method", ["pid", "sign", "quantile"])
def test_imported_biases_of_identity_experts_shift_the_others(method: str) -> None:
    """PID leaves identity experts at 0, so that FFN experts keep their distance from them, and selections stay."""
    config = compose(["model=debug", f"balance.method={method}"])
    experts = config.model.num_experts
    biases = torch.linspace(-0.01, 0.01, config.model.num_routed).repeat(config.model.num_layers, 1)
    biases[:, experts:] = 0.004
    (state,) = (value for name, value in controller_state(config, biases).items() if name in ("integral", "bias"))
    torch.testing.assert_close(state[:, :experts].float(), biases[:, :experts] - 0.004)
