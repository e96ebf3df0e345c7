"""Released checkpoints: a small look-alike of each variant is imported rightly, or refused with the field's name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longcat.errors import ConfigError
from longcat.rope import RopeScaling
from tests.support.exporting import (
    SMALL,
    assert_close,
    our_logits,
    peer_of,
    run_command,
    some_tokens,
    trained,
    weights,
)
from tests.support.fixtures import Refused
from tests.support.lookalikes import Tensors, fp8_config, lookalike, quantize, read_tensors
from tests.support.running import train_here
from train.checkpoint.offline_reader import Checkpoint
from train.huggingface.config_json import read_config
from train.huggingface.import_folder import configuration_of, model_overrides
from train.huggingface.safetensors_folder import SafetensorsFolder

BUDGET = "model.expected_ffn_experts=2"
YARN = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}


@pytest.fixture(scope="module")
def export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "float32"
    run_command("export", f"source={checkpoint}", f"target={folder}", "export.dtype=float32")
    return folder


def imported(source: Path, *words: str) -> Path:
    """The checkpoint that a folder becomes."""
    target = source.with_name(f"{source.name}-imported")
    run_command("import", f"source={source}", f"target={target}", *words)
    return target


def assert_same_weights(folder: Path, checkpoint: Path) -> None:
    back, original = weights(folder), weights(checkpoint)
    assert back.keys() == original.keys() and all(torch.equal(back[name], original[name]) for name in original)


@pytest.mark.parametrize("layers", [None, 2, 4])
def test_flash_has_no_model_type_and_extra_buffers(
    layers: int | None, checkpoint: Path, export: Path, tmp_path: Path
) -> None:
    """As released: mla in small letters, a misspelt field, buffers that follow from the sizes, code beside it."""

    def with_buffers(tensors: Tensors) -> Tensors:
        buffer = {f"model.layers.{n}.self_attn.{m}.rotary_emb.inv_freq": torch.ones(4) for n in (0, 1) for m in (0, 1)}
        return tensors | buffer

    fields: dict[str, Any] = {
        "auto_map": {"AutoModel": "modeling_longcat_flash.LongcatFlashModel"},
        "attention_method": "mla",
        "rounter_params_dtype": "float32",
        "transformers_version": "4.57.0.dev0",
        "rope_scaling": None,
        "sliding_window": None,
    }
    if layers is not None:
        fields["num_hidden_layers"] = layers
    source = lookalike(export, tmp_path / "flash", fields, ("model_type", "num_nextn_predict_layers"), with_buffers)
    assert_same_weights(imported(source, BUDGET), checkpoint)


def test_second_names_of_fields_are_read(checkpoint: Path, export: Path, tmp_path: Path) -> None:
    tree = json.loads((export / "config.json").read_text())
    fields = {"num_experts_per_tok": tree["moe_topk"], "intermediate_size": tree["ffn_hidden_size"]}
    source = lookalike(export, tmp_path / "other", fields, ("moe_topk",))
    assert_same_weights(imported(source, BUDGET), checkpoint)


@pytest.mark.parametrize("block", [(128, 128), (16, 24)])
def test_fp8_weights_are_multiplied_by_their_scales(
    block: tuple[int, int], export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One tensor at a time; biases, norms and routers are not quantised."""
    read: list[int] = []
    plain = SafetensorsFolder.read

    def reading(self: Any, name: str, shape: Any, box: Any) -> Tensor:
        values = plain(self, name, shape, box)
        read.append(values.numel())
        return values

    monkeypatch.setattr(SafetensorsFolder, "read", reading)
    stored, meaning = quantize(read_tensors(export), block)
    assert sum(values.dtype == torch.float8_e4m3fn for values in stored.values()) > 60
    fields = {"quantization_config": fp8_config(block)}
    source = lookalike(export, tmp_path / "fp8", fields, ("model_type",), lambda _: stored)
    target = imported(source, BUDGET)
    assert max(read) == meaning["lm_head.weight"].numel() < sum(read) / 4
    run_command("export", f"source={target}", f"target={tmp_path / 'back'}", "export.dtype=float32")
    back = read_tensors(tmp_path / "back")
    assert back.keys() == meaning.keys() and all(torch.equal(back[name], meaning[name]) for name in back)
    run_command("generate", f"source={source}", "prompt=def main(", "max_tokens=4")


def test_quantisation_that_does_not_fit_is_refused(export: Path, tmp_path: Path, refused: Refused) -> None:
    stored, _ = quantize(read_tensors(export), (16, 16))
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    fp8 = fp8_config((16, 16))

    def attempt(label: str, quantization: Any, tensors: Tensors, *parts: str) -> None:
        fields = {} if quantization is None else {"quantization_config": quantization}
        source = lookalike(export, tmp_path / label, fields, (), lambda _: tensors)
        refused(["import", f"source={source}", f"target={tmp_path / 'out'}", BUDGET], *parts)

    attempt("plain", fp8, read_tensors(export), "quantization_config", "no weight is F8_E4M3")
    attempt("unsaid", None, stored, "F8_E4M3", "no quantization_config")
    attempt("no-scale", fp8, {key: stored[key] for key in stored if key != f"{name}_scale_inv"}, name, "no scales")
    attempt("stray", fp8, stored | {name: stored[name].float()}, name, "has scales")
    attempt("orphan", fp8, stored | {"model.other.weight_scale_inv": torch.ones(1, 1)}, "unknown model.other")
    attempt("blocks", fp8_config((8, 16)), stored, "_scale_inv", "does not fit")
    attempt("nan", fp8, stored | {f"{name}_scale_inv": torch.full((1, 2), torch.nan)}, name, "not finite")
    for field, value in (("quant_method", "awq"), ("fmt", "e5m2"), ("bits", 4), ("weight_block_size", None)):
        attempt(f"other-{field}", fp8 | {field: value}, stored, f"quantization_config.{field}")


def test_mtp_embedding_of_another_type_is_shared(checkpoint: Path, export: Path, tmp_path: Path) -> None:
    """Equal values are one embedding, whatever type stores them; others are refused (test_import)."""
    name, copy = "model.embed_tokens.weight", "model.mtp.embed_tokens.weight"

    def rounded(tensors: Tensors) -> Tensors:
        tensors[name] = tensors[name].bfloat16().float()
        return tensors | {copy: tensors[name].bfloat16()}

    target = imported(lookalike(export, tmp_path / "shared", {}, (), rounded), BUDGET)
    assert torch.equal(
        weights(target)["embed_tokens.weight"], weights(checkpoint)["embed_tokens.weight"].bfloat16().float()
    )


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("kind", ["yarn", "deepseek_yarn"])
def test_yarn_is_computed_trained_and_exported(
    field: str, kind: str, corpus: Path, export: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Logits equal transformers'; after two steps both exported layouts equal transformers' again."""
    from transformers import AutoModelForCausalLM

    source = lookalike(export, tmp_path / "yarn", {field: YARN | {"type": kind}, "rope_theta": 100.0})
    target = imported(source, BUDGET)
    model = Checkpoint(target).model
    assert (model.rope_theta, model.rope_scaling) == (100.0, RopeScaling(4, 16, mscale=1, mscale_all_dim=1))
    peer: Any = peer_of(model, read_tensors(export))
    assert peer.config.rope_parameters["rope_type"] == "yarn"
    assert_close(our_logits(target, some_tokens()), peer(input_ids=some_tokens()).logits)
    unscaled = our_logits(checkpoint, some_tokens())
    assert (our_logits(target, some_tokens()) - unscaled).abs().max() > 0.01 * unscaled.abs().max()

    sizes = model_overrides(model)
    assert {"model.rope_scaling.factor=4.0", "model.rope_scaling.original_max_position_embeddings=16"} <= set(sizes)
    words = [*sizes, *(word for word in SMALL if not word.startswith("model"))]
    paths = [f"data.paths=[{corpus}]", f"run.dir={tmp_path}", f"checkpoint.resume={target}"]
    assert train_here([*words, *paths, "run.name=run"]) == 0
    run = tmp_path / "run" / "checkpoints" / "step-00000002"
    for layout in ("released", "transformers"):
        folder = tmp_path / layout
        run_command("export", f"source={run}", f"target={folder}", "export.dtype=float32", f"export.layout={layout}")
        again = imported(folder)
        assert Checkpoint(again).model == Checkpoint(run).model
        assert torch.equal(our_logits(again, some_tokens()), our_logits(run, some_tokens()))
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "transformers", dtype=torch.float32, attn_implementation="eager"
    )
    assert_close(theirs(input_ids=some_tokens()).logits, our_logits(run, some_tokens()))
    tree = json.loads((tmp_path / "released" / "config.json").read_text())
    assert tree["rope_theta"] == 100 and YARN.items() <= tree["rope_scaling"].items()


@pytest.mark.parametrize(
    ("parameters", "amplitude", "scores"),
    [
        ({}, 1.1386, 1.0),
        ({"mscale": 0.5}, 1.0693, 1.0),
        ({"mscale_all_dim": 0.5}, 1.1386 / 1.0693, 1.0693**2),
        ({"mscale": 0.0, "mscale_all_dim": 1.0}, 1 / 1.1386, 1.1386**2),
    ],
)
def test_deepseek_s_formula_of_the_scales(
    parameters: dict[str, float], amplitude: float, scores: float, export: Path, tmp_path: Path
) -> None:
    """g(mscale, 1 by default) / g(mscale_all_dim, 0 by default), g(m) = 0.1·m·ln 4 + 1; scores g(mscale_all_dim)²."""
    scaling = {"type": "deepseek_yarn", "factor": 4, "original_max_position_embeddings": 16, **parameters}
    source = lookalike(export, tmp_path / "yarn", {"rope_scaling": scaling})
    found = read_config(source, 1)["rope_scaling"]
    assert (found.amplitude, found.score_scale) == pytest.approx((amplitude, scores), rel=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "fragments"),
    [
        ("model_type", "longcat_flash_ngram", "n-gram embeddings"),
        ("model_type", "longcat_flash_pro", "sparse attention"),
        ("architectures", ["LongcatFlashNgramForCausalLM"], "n-gram embeddings"),
        ("architectures", ["LongcatCausalLM"], "LongCat-2.0"),
        ("architectures", ["LlamaForCausalLM"], "architectures is 'LlamaForCausalLM'"),
        ("ngram_vocab_size_ratio", 78, "ngram_vocab_size_ratio .78., which belongs to n-gram embeddings"),
        ("oe_neighbor_num", 5, "oe_neighbor_num"),
        ("emb_split_num", 4, "emb_split_num"),
        ("index_topk", 2048, "index_topk .2048., which belongs to sparse attention"),
        ("use_longcat_dsa", True, "use_longcat_dsa is True.*sparse attention"),
        ("scoring_func", "sigmoid", "scoring_func"),
        ("n_group", 8, "n_group is 8"),
        ("n_shared_experts", 1, "n_shared_experts is 1"),
        ("first_k_dense_replace", 1, "first_k_dense_replace"),
        ("norm_topk_prob", True, "norm_topk_prob"),
        ("sliding_window", 4096, "sliding_window is 4096"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor is 0.5"),
        ("rope_interleave", False, "rope_interleave"),
        ("logit_softcapping", 30.0, "logit_softcapping .30.0., which is not known"),
        ("num_hidden_layers", 3, "num_hidden_layers is 3.*2 or 4"),
        ("num_key_value_heads", 1, "num_key_value_heads is 1"),
        ("head_dim", 128, "head_dim is 128"),
        ("qk_head_dim", 128, "qk_head_dim is 128"),
        ("num_experts_per_tok", 2, "moe_topk is 3 and num_experts_per_tok"),
        ("mtp_num_layers", 3, "num_nextn_predict_layers is 1 and mtp_num_layers"),
        ("num_nextn_predict_layers", 2, "num_nextn_predict_layers is 2 and the weights have 1"),
        ("rope_scaling", {"factor": 4}, "rope_scaling has no type"),
        ("rope_scaling", {"type": "linear", "factor": 4}, "'linear'"),
        ("rope_scaling", {"type": "yarn", "rope_type": "linear", "factor": 4}, "contradict"),
        ("rope_scaling", {"type": "yarn", "factor": 4}, "no original_max_position_embeddings"),
        ("rope_scaling", YARN | {"factor": "4"}, "rope_scaling.factor is '4'"),
        ("rope_scaling", YARN | {"beta_quick": 32}, "rope_scaling.beta_quick is not known"),
        ("rope_scaling", YARN | {"rope_theta": 7.0}, "rope_scaling.rope_theta and rope_theta contradict"),
        ("rope_scaling", YARN | {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ("rope_parameters", {"rope_type": "default", "factor": 4}, "rope_parameters.factor is not known"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(
    field: str, value: Any, fragments: str, export: Path, tmp_path: Path
) -> None:
    source = lookalike(export, tmp_path / "source", {field: value})
    with pytest.raises(ConfigError, match=fragments):
        read_config(source, 1)


def test_yarn_beside_default_parameters_is_refused(export: Path, tmp_path: Path, refused: Refused) -> None:
    fields = {"rope_scaling": YARN, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    source = lookalike(export, tmp_path / "both", fields)
    words = ["import", f"source={source}", f"target={tmp_path / 'out'}", BUDGET]
    refused(words, "rope_scaling", "rope_parameters", "contradict each other")
    equal = lookalike(export, tmp_path / "equal", fields | {"rope_parameters": YARN | {"rope_theta": 1e6}})
    assert read_config(equal, 1)["rope_scaling"].factor == 4


def test_neither_type_nor_architecture_is_refused(export: Path, tmp_path: Path, refused: Refused) -> None:
    source = lookalike(export, tmp_path / "source", {}, ("model_type", "architectures"))
    refused(
        ["import", f"source={source}", f"target={tmp_path / 'out'}", BUDGET], "neither model_type nor architectures"
    )


@pytest.mark.parametrize(
    ("sizes", "budget"),
    [((512, 256, 12), 8.0), ((256, 128, 12), 8.0), ((768, 128, 12), 8.0), ((8, 0, 3), 3.0), ((512, 128, 12), None)],
)
def test_budgets_of_released_models(
    sizes: tuple[int, int, int], budget: float | None, export: Path, tmp_path: Path
) -> None:
    """Flash, Lite and 2.0; without identity experts it is K; otherwise it is not guessed."""
    fields = dict(zip(("n_routed_experts", "zero_expert_num", "moe_topk"), sizes, strict=True))
    found = read_config(lookalike(export, tmp_path / "source", fields), 1)
    assert found.get("expected_ffn_experts") == budget


def test_an_unknown_budget_is_asked_for(export: Path, tmp_path: Path, refused: Refused) -> None:
    """`longcat generate` needs none."""
    source = lookalike(export, tmp_path / "source")
    refused(["import", f"source={source}", f"target={tmp_path / 'out'}"], "model.expected_ffn_experts", "at most 3")
    run_command("generate", f"source={source}", "prompt=def main(", "max_tokens=4")
    assert Checkpoint(imported(source, BUDGET)).model.expected_ffn_experts == 2


@pytest.mark.parametrize(
    ("field", "value", "key"),
    [
        ("rope_theta", 5e5, "model.rope_theta"),
        ("rms_norm_eps", 1e-6, "model.rms_norm_eps"),
        ("routed_scaling_factor", 3.0, "model.routed_scaling_factor"),
        ("moe_topk", 4, "model.top_k"),
        ("rope_scaling", YARN, "model.rope_scaling"),
        ("max_position_embeddings", 64, "train.sequence_length"),
    ],
)
def test_config_json_may_not_contradict_our_record(
    field: str, value: Any, key: str, export: Path, tmp_path: Path, refused: Refused
) -> None:
    """Unless the command line says which one is right."""
    source = lookalike(export, tmp_path / "source", {field: value}, record=True)
    target = f"target={tmp_path / 'out'}"
    for command in (["import", f"source={source}", target], ["generate", f"source={source}", "prompt=x"]):
        refused(command, field, "longcat.json", key, "contradict each other")
    if not isinstance(value, dict):
        assert configuration_of(SafetensorsFolder(source), [f"{key}={value}"])


def test_runs_of_before_yarn_resume(checkpoint: Path, tmp_path: Path, corpus: Path) -> None:
    """Their configuration has no key of it."""
    old = tmp_path / "step-00000002"
    shutil.copytree(checkpoint, old)
    from train.checkpoint.compatibility import differences

    stored = json.loads((old / "state.json").read_text())["configuration"]
    without = stored | {"model": {key: value for key, value in stored["model"].items() if key != "rope_scaling"}}
    assert "rope_scaling" in stored["model"] and not differences(without, stored)
    changed = stored["model"] | {"rope_scaling": stored["model"]["rope_scaling"] | {"factor": 2.0}}
    assert differences(without, stored | {"model": changed}) == ["model.rope_scaling.factor was 1.0 and is now 2.0"]


def test_a_trained_yarn_model_notes_other_formulas(corpus: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["model.rope_scaling.factor=4", "model.rope_scaling.original_max_position_embeddings=16"]
    source = trained(corpus, tmp_path, *words, "model.rope_scaling.attention_factor=1.5")
    capsys.readouterr()
    run_command("export", f"source={source}", f"target={tmp_path / 'out'}")
    assert "by 1.1386 where this model has 1.5000" in capsys.readouterr().err
