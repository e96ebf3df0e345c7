"""Counts from the configuration: the report's figures, and those of a built model."""

from __future__ import annotations

import pytest
import torch

from longcat.counts import active_range, count_parameters, flops_per_token
from longcat.model import LongCat
from train.compose import compose

PRESETS = ("debug", "tiny", "small", "proxy_768", "lite", "flash_half", "flash")


def test_sizes_of_the_560b_model_are_the_report_s() -> None:
    """560.66B in total; 18.69 / 27.15 / 31.38B active with 0 / 8 / 12 FFN experts."""
    model = compose(["model=flash"]).model
    assert round(count_parameters(model).total / 1e9, 2) == 560.66
    assert [round(active / 1e9, 2) for active in active_range(model)] == [18.69, 27.15, 31.38]
    assert model.query_scale == 2.0
    assert round(model.latent_scale, 3) == 3.464


def test_sizes_of_small() -> None:
    """~94M counts transformers' class, which stores gate and up matrices for the identity experts too."""
    model = compose(["model=small"]).model
    unused = model.num_layers * model.num_zero_experts * 2 * model.expert_hidden_size * model.hidden_size
    assert round((count_parameters(model).total + unused) / 1e6) == 94


@pytest.mark.parametrize("preset", PRESETS)
def test_counts_equal_the_built_model(preset: str) -> None:
    model_config = compose([f"model={preset}"]).model
    with torch.device("meta"):
        model = LongCat(model_config)
    built = sum(parameter.numel() for parameter in model.parameters())
    counts = count_parameters(model_config)
    assert built == counts.total + counts.mtp


def test_flops_follow_the_ffn_experts_in_use() -> None:
    model = compose(["model=flash"]).model
    expert = 6 * 3 * model.hidden_size * model.expert_hidden_size * model.num_layers
    fewer = flops_per_token(model, 8192, ffn_experts=6)
    more = flops_per_token(model, 8192, ffn_experts=7)
    assert more - fewer == pytest.approx(expert)
    assert flops_per_token(model, 8192, mtp=True) > flops_per_token(model, 8192)


def test_flops_equal_torch_s_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products of one forward and backward, counted by torch, on a model with only FFN experts."""
    from torch.utils.flop_counter import FlopCounterMode

    from longcat.init import initialise

    monkeypatch.setattr("longcat.ops.grouped.BLOCK", 1)  # no rows but the experts' own
    config = compose(
        ["model=debug", "model.num_zero_experts=0", "model.expected_ffn_experts=3", "model.num_mtp_layers=0"]
    ).model
    model = LongCat(config)
    initialise(model, config, 0)
    tokens = torch.arange(64)[None]
    with FlopCounterMode(display=False) as counter:
        model(tokens, tokens, torch.ones_like(tokens, dtype=torch.bool)).lm.backward()
    ours = 64 * flops_per_token(config, 64)
    # one block of 64 queries computes the full square
    heads = config.num_heads * (config.qk_head_dim + config.v_head_dim)
    square = 64 * 6 * 2 * config.num_layers * heads * (64 - 65 / 2)
    assert counter.get_total_flops() == pytest.approx(ours + square, rel=0.002)
