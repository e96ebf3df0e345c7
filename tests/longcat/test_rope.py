"""YaRN: frequencies and scale equal transformers' own, caches follow them, wrong values are refused."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from longcat.generation import Decoder
from longcat.rope import RopeScaling, frequencies, rotary_angles
from tests.longcat.peers import BASE, our_model, plain_peer, randomise

LITE = RopeScaling(factor=10, original_max_position_embeddings=32768, mscale=1, mscale_all_dim=1)
SCALINGS: dict[str, tuple[int, float, RopeScaling]] = {  # rotary width, θ, scaling
    "lite": (64, 5e6, LITE),
    "two": (64, 1e6, RopeScaling(factor=120, original_max_position_embeddings=8192)),
    "unequal_mscales": (64, 1e4, replace(LITE, mscale=0.707, mscale_all_dim=1.0)),
    "one_mscale": (32, 1e4, replace(LITE, mscale=0.707, mscale_all_dim=0.0)),
    "attention_factor": (32, 1e4, replace(LITE, attention_factor=1.3)),
    "not_truncated": (64, 1e6, replace(LITE, truncate=False)),
    "other_betas": (64, 1e6, replace(LITE, beta_fast=16, beta_slow=2)),
    "short_context": (8, 1e6, RopeScaling(factor=4, original_max_position_embeddings=16)),
    "one_pair": (2, 50.0, RopeScaling(factor=2, original_max_position_embeddings=8)),
}


def theirs(width: int, theta: float, scaling: RopeScaling) -> tuple[torch.Tensor, float]:
    """transformers' frequencies and amplitude."""
    from transformers import LongcatFlashConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    given = {name: value for name, value in asdict(scaling).items() if value or name == "truncate"}
    parameters: dict[str, Any] = {"rope_type": "yarn", "rope_theta": theta, **given}
    config: Any = LongcatFlashConfig(head_dim=width, qk_rope_head_dim=width, rope_parameters=parameters)
    found, amplitude = ROPE_INIT_FUNCTIONS["yarn"](config)
    return found, amplitude


@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_transformers(name: str) -> None:
    width, theta, scaling = SCALINGS[name]
    expected, amplitude = theirs(width, theta, scaling)
    torch.testing.assert_close(frequencies(width, theta, scaling), expected, rtol=1e-6, atol=0)
    assert scaling.amplitude == pytest.approx(amplitude, rel=1e-12)
    angles = rotary_angles(torch.arange(9), width, theta, scaling)
    torch.testing.assert_close(angles.abs(), torch.full_like(angles.abs(), amplitude))


def test_without_scaling_angles_are_the_plain_ones() -> None:
    positions = torch.arange(40)
    pairs = torch.arange(0, 16, 2, dtype=torch.float32) / 16
    plain = positions.float()[:, None] * (1.0 / 1e6**pairs)[None, :]
    assert torch.equal(rotary_angles(positions, 16, 1e6), torch.polar(torch.ones_like(plain), plain))
    assert ModelConfig().softmax_scale == 48**-0.5


@pytest.mark.parametrize("counts", [[1] * 9, [5, 1, 3]])
def test_caches_use_the_scaled_frequencies(counts: list[int]) -> None:
    """Step by step as in one forward, and as transformers computes it."""
    scaling = RopeScaling(factor=4, original_max_position_embeddings=16, mscale=0.8, mscale_all_dim=1.2)
    config = replace(BASE, rope_scaling=scaling, rope_theta=100.0, qk_rope_head_dim=8)
    peer: Any = plain_peer(config)
    randomise(peer, config, seed=0)
    model = our_model(peer, config)
    tokens = torch.randint(config.vocab_size, (1, sum(counts)), generator=torch.Generator().manual_seed(0))
    expected = peer(input_ids=tokens).logits[0].detach()
    position = 0
    with torch.no_grad(), Decoder(model, tokens.shape[1]) as decoder:
        for count in counts:
            logits = decoder.logits(decoder.forward(tokens[0, position : position + count].tolist()))
            wanted = expected[position : position + count]
            assert (logits - wanted).abs().max() <= 2e-5 * wanted.abs().max()
            position += count


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"factor": 0.5}, "model.rope_scaling.factor=0.5"),
        ({"factor": 4.0}, "needs model.rope_scaling.original_max_position_embeddings"),
        ({"attention_factor": 2.0}, "needs model.rope_scaling.factor above 1"),
        (
            {"factor": 2.0, "original_max_position_embeddings": 8, "beta_slow": 40.0},
            "below model.rope_scaling.beta_fast",
        ),
        ({"mscale": -1.0}, "must not be negative"),
    ],
)
def test_impossible_scalings_are_refused(changes: dict[str, Any], fragment: str) -> None:
    with pytest.raises(ConfigError, match=fragment):
        replace(BASE, rope_scaling=RopeScaling(**changes)).validate()
