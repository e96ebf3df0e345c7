"""The coordinate check: slopes of known laws, what its hooks record, and which values its arms have."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.coordinate_check import (
    ARMS,
    FACTORS,
    MODULES,
    cell,
    configuration,
    measure,
    recording,
    rms,
    slope,
    slopes,
)
from longcat.init import initialise
from longcat.model import LongCat
from tests.support.running import run_cleanly
from train.api import compose


@pytest.mark.parametrize("power", [-1.0, 0.0, 0.5, 1.5])
def test_slope_is_the_power_of_a_law(power: float) -> None:
    assert slope([32, 64, 128, 256], [0.3 * width**power for width in (32, 64, 128, 256)]) == pytest.approx(power)
    assert math.isnan(slope([1, 2], [0, 1]))


def test_slopes_are_taken_seed_by_seed() -> None:
    found = {
        (arm, factor, seed): {"values": {"MoE": [1.0, factor ** (seed / 2)]}}
        for arm in ARMS
        for factor in FACTORS
        for seed in (1, 3)
    }
    assert slopes(found, "plain", "values", "MoE", 1) == [pytest.approx(0.5), pytest.approx(1.5)]
    assert cell([0.5, 1.5]) == "1.00 ± 0.71"
    assert cell([-0.001, 0.001]) == "0.00 ± 0.00"


def test_hooks_record_each_module_and_leave() -> None:
    """The recorded outputs add up to the residual stream, and the logits are the model's own."""
    config = compose("model=debug", "model.num_mtp_layers=0", "model.embedding_std=0.5").model
    model = LongCat(config)
    initialise(model, config, seed=1)
    tokens = torch.arange(32).view(2, 16)
    with torch.no_grad(), recording(model) as found:
        model(tokens, tokens, tokens >= 0)
    counts = {name: len(found[name]) for name in MODULES}
    layers = config.num_layers
    assert counts == {
        "embedding": 1, "attention": 2 * layers, "dense FFN": 2 * layers, "MoE": layers, "residual stream": 1,
        "logits": 1, "router logits": layers, "router scores": layers,
    }  # fmt: skip
    written = [each.view(2, 16, -1) for name in ("embedding", "attention", "dense FFN", "MoE") for each in found[name]]
    torch.testing.assert_close(sum(written), found["residual stream"][0])
    torch.testing.assert_close(found["logits"][0], model.logits(tokens).detach())
    torch.testing.assert_close(torch.softmax(found["router logits"][1], -1), found["router scores"][1])
    assert all(not module._forward_hooks for module in model.modules())
    assert all("combine" not in vars(layer.mlp) for layer in model.shortcut_layers())
    assert counts == {name: len(found[name]) for name in MODULES}, "a later forward is not recorded"


def test_changes_begin_with_the_first_step(overrides: list[str]) -> None:
    config = compose(
        *overrides, "model.num_mtp_layers=0", "train.steps=2", "train.micro_batch_size=4", "validation.batches=1",
        "schedule.warmup_steps=0", "run.name=probe",
    )  # fmt: skip
    found: dict[str, dict[str, list[float]]] = {}
    assert run_cleanly(lambda: found.update(measure(config)) or 0) == 0
    for name in MODULES:
        values, changes = found["values"][name], found["changes"][name]
        assert len(values) == len(changes) == 3
        assert values[0] > 0 and changes[0] == 0 < min(changes[1:]) and max(changes[1:]) < 2 * values[0], name
        assert changes[1] != changes[2], name


def test_rms_is_over_all_elements() -> None:
    assert rms([torch.tensor([3.0]), torch.tensor([[4.0, 0.0, 0.0]])]) == pytest.approx(2.5)


def test_arms_differ_by_table_1_alone() -> None:
    narrow, plain, scaled = (
        configuration(arm, factor, 1, []) for arm, factor in ((ARMS[0], 1), (ARMS[0], 4), (ARMS[1], 4))
    )
    assert plain.optim == narrow.optim
    assert scaled.optim.lr_scale.hidden == narrow.optim.lr_scale.hidden / 4
    assert scaled.model.hidden_std == narrow.model.hidden_std / 2
    plain.model.hidden_std = scaled.model.hidden_std
    assert plain.model == scaled.model, "the same sizes"
    assert (plain.train, plain.data) == (scaled.train, scaled.data)
