"""Logical names cover what is stored, and initial values depend on (seed, name, rows) alone."""

from __future__ import annotations

import pytest
import torch

from longcat.init import BLOCK_ELEMENTS, fill, initialise, normal_box
from longcat.model import LongCat
from longcat.names import logical_tensors, pieces, stored_state
from longcat.roles import role
from train.compose import compose

CONFIG = compose(["model=debug"]).model


def built(seed: int = 0) -> LongCat:
    model = LongCat(CONFIG)
    initialise(model, CONFIG, seed)
    return model


def test_every_stored_value_has_one_logical_index() -> None:
    model = built()
    stored = sum(tensor.numel() for _, tensor in stored_state(model))
    logical = dict(logical_tensors(model))
    assert sum(tensor.numel() for tensor in logical.values()) == stored
    assert len(logical) == len(list(logical_tensors(model)))
    assert logical["model.layers.1.mlp.experts.7.up_proj.weight"].shape == (64, 128)
    assert logical["model.layers.0.mlp.router.e_score_correction_bias"].shape == (12,)
    assert "lm_head.weight" in logical
    assert "model.mtp.layers.0.eh_proj.weight" in logical


def test_released_names_and_shapes_of_the_560b_model() -> None:
    """The table of the released layout, on the meta device."""
    config = compose(["model=flash"]).model
    with torch.device("meta"):
        model = LongCat(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in logical_tensors(model)}
    layer = "model.layers.27"
    expected = {
        "model.embed_tokens.weight": (131072, 6144),
        "lm_head.weight": (131072, 6144),
        "model.norm.weight": (6144,),
        f"{layer}.input_layernorm.1.weight": (6144,),
        f"{layer}.post_attention_layernorm.0.weight": (6144,),
        f"{layer}.self_attn.0.q_a_proj.weight": (1536, 6144),
        f"{layer}.self_attn.0.q_a_layernorm.weight": (1536,),
        f"{layer}.self_attn.1.q_b_proj.weight": (64 * 192, 1536),
        f"{layer}.self_attn.0.kv_a_proj_with_mqa.weight": (576, 6144),
        f"{layer}.self_attn.0.kv_a_layernorm.weight": (512,),
        f"{layer}.self_attn.0.kv_b_proj.weight": (64 * 256, 512),
        f"{layer}.self_attn.0.o_proj.weight": (6144, 8192),
        f"{layer}.mlps.0.gate_proj.weight": (12288, 6144),
        f"{layer}.mlps.1.down_proj.weight": (6144, 12288),
        f"{layer}.mlp.router.classifier.weight": (768, 6144),
        f"{layer}.mlp.router.e_score_correction_bias": (768,),
        f"{layer}.mlp.experts.511.gate_proj.weight": (2048, 6144),
        f"{layer}.mlp.experts.511.down_proj.weight": (6144, 2048),
        "model.mtp.layers.0.enorm.m.weight": (6144,),
        "model.mtp.layers.0.eh_proj.weight": (6144, 12288),
        "model.mtp.layers.0.transformer_layer.mlp.up_proj.weight": (12288, 6144),
        "model.mtp.norm.weight": (6144,),
    }
    assert {name: shapes.get(name) for name in expected} == expected


def test_initial_values_depend_on_the_seed_alone() -> None:
    first, again, other = (dict(logical_tensors(built(seed))) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    experts = [first[f"model.layers.0.mlp.experts.{number}.gate_proj.weight"] for number in (0, 1)]
    assert not torch.equal(*experts)


@pytest.mark.parametrize("box", [((0, 3), (0, 10)), ((5, 17), (2, 9)), ((16, 17), (0, 1)), ((4, 4), (0, 10))])
def test_any_box_equals_that_box_of_the_full_tensor(box: tuple[tuple[int, int], ...]) -> None:
    full = normal_box(3, "x", (17, 10), ((0, 17), (0, 10)))
    (top, bottom), (left, right) = box
    assert torch.equal(normal_box(3, "x", (17, 10), box), full[top:bottom, left:right])


def test_boxes_across_row_blocks() -> None:
    columns = BLOCK_ELEMENTS // 4  # blocks of 4 rows
    full = normal_box(0, "y", (11, columns), ((0, 11), (0, columns)))
    assert torch.equal(normal_box(0, "y", (11, columns), ((3, 9), (5, 50))), full[3:9, 5:50])


@pytest.mark.parametrize("start,stop", [(0, 3), (3, 8), (2, 2)])
def test_shard_of_stacked_experts_has_the_full_tensor_s_values(start: int, stop: int) -> None:
    name = "layers.0.mlp.experts.gate_up"
    shape = (CONFIG.num_experts, 2 * CONFIG.expert_hidden_size, CONFIG.hidden_size)
    full, part = torch.empty(shape), torch.empty(stop - start, *shape[1:])
    fill(full, name, shape, None, CONFIG, 0)
    fill(part, name, shape, ((start, stop), (0, shape[1]), (0, shape[2])), CONFIG, 0)
    assert torch.equal(part, full[start:stop])


def test_pieces_of_a_box_that_cuts_a_matrix() -> None:
    """A box over rows 1..3 of gate_up [2, 4, 5] meets the second gate row and the first up row of each expert."""
    found = list(pieces("layers.0.mlp.experts.gate_up", (2, 4, 5), ((1, 2), (1, 3), (0, 5))))
    assert [(p.name.split(".")[-2], p.box[0]) for p in found] == [("gate_proj", (1, 2)), ("up_proj", (0, 1))]
    assert all(".experts.1." in piece.name and piece.index[0] == 0 for piece in found)


def test_initialisation_role_of_each_parameter() -> None:
    roles = {role(name) for name, _ in built().named_parameters()}
    assert roles == {"embedding", "head", "norm", "router", "expert", "hidden"}


def test_standard_deviations() -> None:
    tensors = dict(logical_tensors(built()))
    assert float(tensors["model.embed_tokens.weight"].std()) == pytest.approx(CONFIG.embedding_std, rel=0.02)
    assert float(tensors["lm_head.weight"].std()) == pytest.approx(CONFIG.hidden_std, rel=0.02)
    assert torch.equal(tensors["model.norm.weight"], torch.ones(CONFIG.hidden_size))
