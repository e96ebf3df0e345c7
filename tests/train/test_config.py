"""The configuration: composition, presets, which keys make two runs the same, and the folder that overrides name."""

from __future__ import annotations

import copy
import re
from contextlib import nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from train.checkpoint.compatibility import differences
from train.compose import check_keys, compose, compose_tree, leaf_keys, named_folder, with_search_path
from train.config import Config
from train.keys.dotted import flatten
from train.run_dir.folder import as_mapping, read_config, write_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

# The documented sizes; the last three are the released model and its relatives.
# Vocabulary, width, layers, heads, ranks of q and kv, per head plain / rotary / value, dense FFN,
# N / Z / K / K_e, expert FFN.
PRESETS = {
    "debug": (4096, 128, 2, 4, 48, 32, 16, 8, 16, 256, 8, 4, 3, 2, 64),
    "tiny": (4096, 256, 4, 4, 96, 64, 32, 16, 32, 512, 16, 8, 6, 4, 128),
    "small": (8192, 512, 4, 8, 192, 96, 64, 32, 64, 1024, 32, 16, 6, 4, 256),
    "proxy_768": (131072, 768, 28, 8, 192, 64, 128, 64, 128, 1536, 512, 256, 12, 8, 256),
    "lite": (131072, 3072, 14, 32, 1536, 512, 128, 64, 128, 6144, 256, 128, 12, 8, 1024),
    "flash_half": (131072, 6144, 14, 64, 1536, 512, 128, 64, 128, 12288, 512, 256, 12, 8, 2048),
    "flash": (131072, 6144, 28, 64, 1536, 512, 128, 64, 128, 12288, 512, 256, 12, 8, 2048),
}
COLUMNS = (
    "vocab_size", "hidden_size", "num_layers", "num_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim",
    "qk_rope_head_dim", "v_head_dim", "ffn_hidden_size", "num_experts", "num_zero_experts", "top_k",
    "expected_ffn_experts", "expert_hidden_size",
)  # fmt: skip
INTERFACE_KEYS = [
    "model.vocab_size",
    "model.num_layers",
    "model.hidden_size",
    "model.num_heads",
    "model.q_lora_rank",
    "model.kv_lora_rank",
    "model.qk_nope_head_dim",
    "model.qk_rope_head_dim",
    "model.v_head_dim",
    "model.ffn_hidden_size",
    "model.num_experts",
    "model.num_zero_experts",
    "model.top_k",
    "model.expected_ffn_experts",
    "model.expert_hidden_size",
    "model.routed_scaling_factor",
    "model.num_mtp_layers",
    "model.rope_theta",
    "loss.mtp_weight",
    "loss.mtp_start_tokens",
    "loss.hidden_z_weight",
    "train.steps",
    "train.seed",
    "train.sequence_length",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.dtype",
    "train.deterministic",
    "parallel.dp",
    "parallel.fsdp",
    "balance.method",
    "balance.kp",
    "balance.ki",
    "balance.kd",
    "balance.decay",
    "balance.num_groups",
    "balance.group_loss_weight",
    "optim.lr",
    "optim.betas",
    "optim.eps",
    "optim.weight_decay",
    "optim.grad_clip",
    "data.paths",
    "data.weights",
    "data.stages",
    "data.mask_documents",
    "data.packing",
    "validation.every",
    "validation.batches",
    "checkpoint.every",
    "checkpoint.keep",
    "checkpoint.resume",
    "logging.wandb",
    "logging.every",
    "logging.hash_every",
    "run.name",
    "run.dir",
    "overlap.enabled",
    "overlap.num_chunks",
    "overlap.experts_after",
]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_have_the_documented_sizes(preset: str) -> None:
    model = compose([f"model={preset}"]).model
    assert model.name == preset
    assert tuple(getattr(model, column) for column in COLUMNS) == PRESETS[preset]
    assert model.routed_scaling_factor == model.ffn_hidden_size / model.expert_hidden_size, "γ = dense / expert width"
    assert model.num_mtp_layers == 1
    assert (model.rms_norm_eps, model.latent_norm_eps, model.rope_theta) == (1e-5, 1e-6, 1e6)


def test_there_are_no_other_presets() -> None:
    assert {path.stem for path in (CONFIGS / "model").glob("*.yaml")} == PRESETS.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_says_every_size_itself(preset: str) -> None:
    """No size is left to the defaults of the dataclass, which are those of one preset."""
    stated = yaml.safe_load((CONFIGS / "model" / f"{preset}.yaml").read_text())
    assert set(COLUMNS) <= stated.keys() <= {field.name for field in fields(ModelConfig)}


def test_the_dataclass_defaults_are_the_default_preset() -> None:
    assert compose([]).model == ModelConfig()


@pytest.mark.parametrize(
    "choice",
    [
        f"{group}={path.stem}"
        for group in ("data", "schedule", "experiment")
        for path in sorted((CONFIGS / group).glob("*.yaml"))
    ],
)
def test_every_choice_composes_and_validates(choice: str) -> None:
    config = compose([choice])
    group, _, name = choice.partition("=")
    assert group == "experiment" or getattr(config, group).name == name


def test_documented_keys_exist() -> None:
    assert set(INTERFACE_KEYS) <= set(leaf_keys(Config))


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["overlap.num_chunks=0"], "must be at least 1"),
        (["overlap.experts_after=norm"], "use ffn or attention"),
        (["overlap.experts_stream=true", "parallel.transport=all_gather"], "change either"),
    ],
)
def test_impossible_overlap_is_refused(words: list[str], advice: str) -> None:
    with pytest.raises(ConfigError, match=advice):
        compose(words)


def test_overrides_set_values_of_their_type() -> None:
    config = compose(["model=small", "model.top_k=5", "optim.lr=3e-3", "data.paths=[a,b]", "schedule=constant"])
    assert (config.model.hidden_size, config.model.top_k) == (512, 5)
    assert (config.optim.lr, config.data.paths, config.schedule.name) == (0.003, ["a", "b"], "constant")
    assert isinstance(compose(["optim.lr=1"]).optim.lr, float)
    assert compose(["train.steps=1", "train.steps=2"]).train.steps == 2, "the last one counts"
    stage = compose(["data.weights=[1]", "data.stages=[{start_tokens: 5, weights: [2]}]"]).data.stages[0]
    assert (stage.start_tokens, stage.weights) == (5, [2.0])


def test_composing_twice_gives_two_configurations() -> None:
    first = compose(["model=debug"])
    second = compose([])
    assert (first.model.name, second.model.name) == ("debug", "tiny")
    first.data.paths.append("x")
    assert "x" not in compose([]).data.paths


def test_the_yaml_composes_to_the_same_configuration() -> None:
    config = compose(["model=debug", "optim.eps=1e-16", "schedule.decay_start=200", "schedule.decay_steps=7"])
    assert yaml.safe_load(yaml.safe_dump(as_mapping(config))) == as_mapping(config)
    assert flatten(as_mapping(config))["optim.eps"] == 1e-16


# ------------------------------------------------------------------------------------- keys and their nearest


def typos(key: str) -> st.SearchStrategy[str]:
    """The key with two neighbouring letters of its last part exchanged, or one letter doubled."""
    head, _, last = key.rpartition(".")
    run_blocking = [last[:i] + last[i + 1] + last[i] + last[i + 2 :] for i in range(len(last) - 1)]
    doubled = [last[:i] + last[i] + last[i:] for i in range(len(last))]
    return st.sampled_from([f"{head}.{word}" for word in [*run_blocking, *doubled] if word != last])


@given(
    st.sampled_from([key for key in INTERFACE_KEYS if len(key.rpartition(".")[2]) > 3]).flatmap(
        lambda key: st.tuples(st.just(key), typos(key))
    )
)
def test_typo_is_answered_with_the_nearest_key(pair: tuple[str, str]) -> None:
    key, typo = pair
    with pytest.raises(ConfigError, match="unknown key") as caught:
        check_keys([f"{typo}=1"])
    assert str(caught.value) == f"unknown key {typo!r}; the nearest is {key!r}"


@given(st.sampled_from(leaf_keys(Config)))
def test_every_key_is_known(key: str) -> None:
    check_keys([f"{key}=1", f"++{key}=1"])


# ------------------------------------------------------------------------------------- the same run or another


def changed(value: Any) -> Any:
    """Some other value of the same type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return [*value, 1.0] if isinstance(value, list) else f"{value}x"


MAY_CHANGE = ("train.steps", "train.dtype", "train.deterministic", "train.stop_after_seconds", "model.name")
ALWAYS = ("parallel.", "validation.", "checkpoint.", "logging.", "run.", "data.source", "data.out", "data.tokenizer")


@pytest.mark.parametrize("key", leaf_keys(Config))
def test_keys_that_change_results_make_another_run(key: str) -> None:
    """Model, losses, data and rates do; length, folder, number of ranks and logging do not."""
    stored = as_mapping(Config())
    wanted = copy.deepcopy(stored)
    node, (*path, leaf) = wanted, key.split(".")
    for part in path:
        node = node[part]
    node[leaf] = changed(node[leaf])
    found = differences(stored, wanted)
    if key in MAY_CHANGE or key.startswith(ALWAYS):
        assert found == []
    elif key.startswith(("model.", "loss.", "balance.", "optim.", "schedule.", "train.")):
        assert len(found) == 1 and found[0].startswith(f"{key} was ") and str(node[leaf]) in found[0]
    else:  # the rest of data: what is read makes another run, what it was built from does not
        decisive = ("data.paths", "data.weights", "data.stages", "data.validation_fraction", "data.mask_documents")
        decisive += ("data.packing",)
        assert bool(found) == (key in decisive)


def test_a_configuration_on_disk_is_the_same_run(corpus: Path, tmp_path: Path) -> None:
    """Floats, nulls and lists survive config.yaml."""
    words = ["model=debug", "optim.lr=0.1", "optim.eps=1e-16", "loss.hidden_z_weight=1e-7", f"run.dir={tmp_path}"]
    config = compose([*words, f"data.paths=[{corpus}]", "run.name=x"])
    (tmp_path / "x").mkdir()
    assert write_config(config, {"parameters": 1}, "cpu", 1, pytest.fail)
    stored = read_config(tmp_path / "x")
    assert {key: stored[key] for key in as_mapping(config)} == as_mapping(config)
    assert differences(stored, as_mapping(config) | {"corpora": stored["corpora"]}) == []
    assert is_dataclass(config) and stored["environment"]["packages"].keys() >= {"torch", "megatron-core", "datasets"}


# ------------------------------------------------------------------------------------- the folder that overrides name


@pytest.mark.parametrize(
    "words,folder",
    [
        ([], "runs/default"),
        (["run.name=a"], "runs/a"),
        (["run.name=a", "run.dir=/x/y", "train.stpes=3"], "/x/y/a"),
        (["experiment=quickstart"], None),
        (["experiment=quickstart", "run.name=a"], "runs/a"),
        (["run.name=../a"], None),
        (["run.name="], None),
    ],
)
def test_run_folder_is_found_even_if_overrides_are_wrong(words: list[str], folder: str | None) -> None:
    assert named_folder(words) == (None if folder is None else Path(folder))


def test_choices_are_stored_as_plain_strings() -> None:
    """config.yaml, checkpoints and W&B get strings, whatever the type of a key is."""
    parallel = as_mapping(compose(["parallel.schedule=1f1b"]))["parallel"]
    assert parallel["schedule"] == "1f1b"
    assert {type(value) for value in parallel.values()} <= {str, int, float, bool, list}
    listed = as_mapping(compose(["parallel.recompute=selective", "parallel.recompute_list=[norms]"]))["parallel"]
    assert [type(value) for value in listed["recompute_list"]] == [str]


@pytest.mark.parametrize(
    ("text", "sweep", "refusal"),
    [
        ("hydra: {run: {dir: x}}", False, "mine.yaml: hydra.run.dir': Hydra's own settings are fixed"),
        ("hydra: null", False, "mine.yaml: hydra': Hydra's own settings are fixed"),
        ("hydra: {run: {dir: x}}", True, "mine.yaml: hydra.run.dir': Hydra's own settings are fixed"),
        ("hydra: {sweeper: {max_batch_size: 2}}", False, "hydra.sweeper.max_batch_size' says how a sweep runs"),
        ("hydra: {sweeper: {max_batch_size: 2}}", True, None),
        ("defaults: [override /hydra/launcher: submitit_local]", False, "submitit_local' says how a sweep runs"),
        ("defaults: [other]", False, "other.yaml: hydra.mode': Hydra's own settings are fixed"),
        ("train: {steps: 3}", False, None),
    ],
)
def test_settings_of_hydra_in_a_file_are_not_ignored(
    text: str, sweep: bool, refusal: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    (folder / "other.yaml").write_text("# @package _global_\nhydra: {mode: MULTIRUN}\n")
    with pytest.raises(ConfigError, match=re.escape(refusal)) if refusal else nullcontext():
        compose_tree(with_search_path(["experiment=mine"]), sweep)
