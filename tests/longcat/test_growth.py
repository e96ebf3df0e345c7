"""Depth growth: which layer initialises which, and that the grown model computes the shallow trunk twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from longcat.growth import Growth, layer_of
from longcat.model import LongCat
from longcat.names import stored_state

SMALL = ModelConfig(
    vocab_size=61,
    num_layers=3,
    hidden_size=16,
    num_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    ffn_hidden_size=20,
    num_experts=6,
    num_zero_experts=3,
    top_k=3,
    expected_ffn_experts=2,
    expert_hidden_size=8,
    num_mtp_layers=2,
)


def random_model(config: ModelConfig) -> LongCat:
    """A model with random values everywhere, also in the selection biases."""
    model = LongCat(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for _, tensor in stored_state(model):
            tensor.normal_(std=0.3)
    return model


def grown_model(shallow: LongCat, growth: Growth) -> LongCat:
    """The deeper model, filled tensor by tensor."""
    deep = LongCat(replace(shallow.config, num_layers=growth.num_layers * growth.factor))
    values = {new: tensor for name, tensor in stored_state(shallow) for new in growth.grown_names(name)}
    with torch.no_grad():
        for name, tensor in stored_state(deep):
            tensor.copy_(values.pop(name))
    assert not values
    return deep


@pytest.mark.parametrize(
    ("growth", "sources"),
    [
        (Growth(3), [0, 1, 2, 0, 1, 2]),
        (Growth(3, 2, "interpose"), [0, 0, 1, 1, 2, 2]),
        (Growth(2, 3), [0, 1, 0, 1, 0, 1]),
        (Growth(2, 3, "interpose"), [0, 0, 0, 1, 1, 1]),
        (Growth(1, 2), [0, 0]),
    ],
)
def test_each_new_layer_starts_as_one_old_layer(growth: Growth, sources: list[int]) -> None:
    assert growth.sources == sources
    for new, old in enumerate(sources):
        assert f"layers.{new}.mlp.x" in growth.grown_names(f"layers.{old}.mlp.x")


def test_the_560b_model_starts_as_flash_half_stacked_twice() -> None:
    assert Growth(14).sources == [*range(14), *range(14)]


def test_only_the_stack_is_repeated() -> None:
    for name in ("embed_tokens.weight", "norm.weight", "lm_head.weight", "mtp.layers.0.mlp.up_proj.weight"):
        assert Growth(2).grown_names(name) == [name] and layer_of(name) is None
    assert Growth(12).grown_names("layers.11.x") == ["layers.11.x", "layers.23.x"]
    assert Growth(12).grown_names("layers.1.x") == ["layers.1.x", "layers.13.x"]


@pytest.mark.parametrize("method", ["stack", "interpose"])
@pytest.mark.parametrize("factor", [2, 3])
def test_grown_names_equal_the_deep_model_s(method: str, factor: int) -> None:
    with torch.device("meta"):
        shallow, deep = LongCat(SMALL), LongCat(replace(SMALL, num_layers=SMALL.num_layers * factor))
    growth = Growth(SMALL.num_layers, factor, method)
    grown = [new for name, _ in stored_state(shallow) for new in growth.grown_names(name)]
    assert len(grown) == len(set(grown))
    assert set(grown) == {name for name, _ in stored_state(deep)}


@torch.no_grad()
@pytest.mark.parametrize("factor", [2, 3])
def test_stacked_forward_is_bitwise_the_repeated_trunk(factor: int) -> None:
    shallow = random_model(SMALL)
    deep = grown_model(shallow, Growth(SMALL.num_layers, factor))
    tokens = torch.randint(0, SMALL.vocab_size, (2, 12))
    z, counts = None, []
    for _ in range(factor):
        z, statistics = shallow.trunk(tokens, None, z)
        counts += [layer.counts for layer in statistics]
    got, statistics = deep.trunk(tokens, None)
    assert z is not None and torch.equal(got, z)
    assert torch.equal(torch.stack([layer.counts for layer in statistics]), torch.stack(counts))
    assert shallow.norm is not None and shallow.lm_head is not None
    assert torch.equal(deep.logits(tokens), shallow.lm_head(shallow.norm(z)))
    once, _ = shallow.trunk(tokens, None)
    assert not torch.equal(got, once)


@torch.no_grad()
def test_interposed_forward_is_bitwise_each_layer_twice() -> None:
    shallow = random_model(SMALL)
    deep = grown_model(shallow, Growth(SMALL.num_layers, 2, "interpose"))
    tokens = torch.randint(0, SMALL.vocab_size, (2, 12))
    assert shallow.embed_tokens is not None
    x, angles = shallow.embed_tokens(tokens), shallow.angles(tokens)
    for layer in shallow.shortcut_layers():
        for _ in range(2):
            x, _ = layer(x, angles, None)
    assert torch.equal(deep.trunk(tokens, None)[0], x)


@pytest.mark.parametrize(
    ("growth", "fragments"),
    [
        (Growth(2, 1), "growth.factor=1 adds no layer"),
        (Growth(2, -2), "growth.factor=-2"),
        (Growth(2, 2, "double"), "growth.method=double is not known; use stack or interpose"),
    ],
)
def test_impossible_growth_is_refused(growth: Growth, fragments: str) -> None:
    with pytest.raises(ConfigError, match=fragments):
        growth.validate()
