"""Exports: names and shapes of both layouts, the same logits in transformers, nothing overwritten."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from longcat.config import ModelConfig
from longcat.rope import RopeScaling
from tests.support.exporting import assert_close, our_logits, peer_of, run_command, some_tokens, trained, weights
from tests.support.fixtures import Refused
from train.checkpoint.offline_reader import Checkpoint
from train.compose import compose
from train.huggingface.layouts import MetaSource, layout_tensors
from train.huggingface.serving import serving_notes

ROOT = Path(__file__).resolve().parents[3]
OLDER = "LONGCAT_OLDER_TRANSFORMERS"  # a folder with transformers 4.57 (pip install --target)


@pytest.fixture(scope="module")
def exports(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float32 exports in both layouts, in shards of 100 KB."""
    folder = tmp_path_factory.mktemp("exports")
    for layout in ("released", "transformers"):
        words = [f"export.layout={layout}", "export.dtype=float32", "export.shard_gib=0.0001"]
        run_command("export", f"source={checkpoint}", f"target={folder / layout}", *words)
    return folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors, read through the index."""
    places = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: load_file(folder / file) for file in sorted(set(places.values()))}
    found = {name: files[file][name] for name, file in places.items()}
    assert sum(len(tensors) for tensors in files.values()) == len(found)
    return found


def table_of_560b() -> dict[str, tuple[int, ...]]:
    """Names and shapes by section 15 of the equations."""
    d, rank, dense, expert = 6144, 512, 12288, 2048
    attention = {
        "q_a_proj": (1536, d),
        "q_a_layernorm": (1536,),
        "q_b_proj": (64 * 192, 1536),
        "kv_a_proj_with_mqa": (rank + 64, d),
        "kv_a_layernorm": (rank,),
        "kv_b_proj": (64 * 256, rank),
        "o_proj": (d, 8192),
    }
    table: dict[str, tuple[int, ...]] = {"model.norm": (d,), "model.mtp.norm": (d,)}
    for name in ("model.embed_tokens", "lm_head", "model.mtp.embed_tokens"):
        table[name] = (131072, d)

    def swiglu(prefix: str, hidden: int) -> None:
        table.update({f"{prefix}.{matrix}_proj": (hidden, d) for matrix in ("gate", "up")})
        table[f"{prefix}.down_proj"] = (d, hidden)

    for layer in (f"model.layers.{number}" for number in range(28)):
        for half in range(2):
            table[f"{layer}.input_layernorm.{half}"] = table[f"{layer}.post_attention_layernorm.{half}"] = (d,)
            table.update({f"{layer}.self_attn.{half}.{name}": shape for name, shape in attention.items()})
            swiglu(f"{layer}.mlps.{half}", dense)
        table[f"{layer}.mlp.router.classifier"] = (768, d)
        for number in range(512):
            swiglu(f"{layer}.mlp.experts.{number}", expert)
    mtp = "model.mtp.layers.0"
    for name in ("enorm.m", "hnorm.m", "input_layernorm", "post_attention_layernorm"):
        table[f"{mtp}.{name}"] = (d,)
    table[f"{mtp}.eh_proj"] = (d, 2 * d)
    table.update({f"{mtp}.self_attn.{name}": shape for name, shape in attention.items()})
    swiglu(f"{mtp}.transformer_layer.mlp", dense)
    biases = {f"model.layers.{number}.mlp.router.e_score_correction_bias": (768,) for number in range(28)}
    return {f"{name}.weight": shape for name, shape in table.items()} | biases


def test_names_and_shapes_of_the_560b_export() -> None:
    config = compose(["model=flash"]).model
    found = {name: tuple(tensor.shape) for name, tensor in layout_tensors(config, "released", MetaSource())}
    assert found == table_of_560b()
    loadable = {name: tuple(tensor.shape) for name, tensor in layout_tensors(config, "transformers", MetaSource())}
    extra = loadable.keys() - found.keys()
    assert len(extra) == 28 * 256 * 2 and {loadable[name] for name in extra} == {(2048, 6144)}
    assert "model.layers.27.mlp.experts.767.up_proj.weight" in extra


def test_export_holds_the_checkpoint_s_values_bitwise(checkpoint: Path, exports: Path) -> None:
    stored = weights(checkpoint)
    assert stored["layers.1.mlp.router.e_score_correction_bias"].any(), "zero biases test little"
    for layout in ("released", "transformers"):
        found = tensors_of(exports / layout)
        assert torch.equal(found["model.mtp.embed_tokens.weight"], stored["embed_tokens.weight"])
        for name, values in stored.items():
            if ".experts." not in name:
                assert torch.equal(found[name if name.startswith("lm_head") else f"model.{name}"], values), name
        gate_up, down = (stored[f"layers.1.mlp.experts.{kind}"] for kind in ("gate_up", "down"))
        for expert in range(8):
            gate, up = gate_up[expert].chunk(2)
            for matrix, values in (("gate", gate), ("up", up), ("down", down[expert])):
                assert torch.equal(found[f"model.layers.1.mlp.experts.{expert}.{matrix}_proj.weight"], values)
        identity = {name for name in found if ".experts.8." in name or ".experts.11." in name}
        assert len(identity) == (8 if layout == "transformers" else 0)
        assert not any(found[name].any() for name in identity)


def test_shards_keep_to_their_size(exports: Path) -> None:
    files = sorted((exports / "released").glob("*.safetensors"))
    count = len(files)
    assert [path.name for path in files] == [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    assert count > 5
    for path in files:
        tensors = load_file(path)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 0.0001 * 2**30
        assert path.stat().st_mode & 0o444 == 0o444


def test_transformers_layout_gives_the_same_logits(checkpoint: Path, exports: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        exports / "transformers", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    peer, info = loaded
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert_close(peer(input_ids=some_tokens()).logits, our_logits(checkpoint, some_tokens()))
    assert peer.config.max_position_embeddings == 32 and peer.config.rope_parameters["rope_theta"] == 1e6

    tokenizer: Any = AutoTokenizer.from_pretrained(exports / "transformers")
    text = "def main(words):\n    return 17\n"
    from train.data.tokens import load_tokenizer

    assert tokenizer(text)["input_ids"] == load_tokenizer(exports / "released" / "tokenizer.json").encode(text).ids
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.eos_token_id == 0
    assert GenerationConfig.from_pretrained(exports / "released").eos_token_id == 0


def test_released_layout_loads_into_an_independent_model(checkpoint: Path, exports: Path) -> None:
    peer: Any = peer_of(Checkpoint(checkpoint).model, tensors_of(exports / "released"))
    assert_close(peer(input_ids=some_tokens()).logits, our_logits(checkpoint, some_tokens()))


def test_released_layout_loads_without_identity_experts(corpus: Path, tmp_path: Path) -> None:
    """Without identity experts both layouts are one, which transformers 5.23 reads."""
    from transformers import AutoModelForCausalLM

    plain = trained(corpus, tmp_path, "model.num_zero_experts=0", "model.expected_ffn_experts=3")
    run_command("export", f"source={plain}", f"target={tmp_path / 'plain'}", "export.dtype=float32")
    peer: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", dtype=torch.float32, attn_implementation="eager"
    )
    assert_close(peer(input_ids=some_tokens()).logits, our_logits(plain, some_tokens()))


OLDER_PROGRAM = """
import sys, torch, transformers
from transformers import AutoModelForCausalLM
assert transformers.__version__.startswith("4.5"), transformers.__version__
tokens = torch.load(sys.argv[2])
kept = {"torch_dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], **kept)
assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
torch.save(model(input_ids=tokens).logits.detach(), sys.argv[3])
"""


@pytest.mark.skipif(not os.environ.get(OLDER), reason=f"needs a folder with transformers 4.57 in {OLDER}")
def test_transformers_4_57_gives_the_same_logits(checkpoint: Path, exports: Path, tmp_path: Path) -> None:
    """transformers 4.57 loads the released layout."""
    torch.save(some_tokens(), tmp_path / "tokens")
    words = [sys.executable, "-c", OLDER_PROGRAM, exports / "released", tmp_path / "tokens", tmp_path / "logits"]
    environment = {**os.environ, "PYTHONPATH": os.environ[OLDER]}
    ended = subprocess.run(words, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert_close(torch.load(tmp_path / "logits"), our_logits(checkpoint, some_tokens()))


def test_bfloat16_is_the_default_except_for_routers(checkpoint: Path, tmp_path: Path) -> None:
    run_command("export", f"source={checkpoint.parents[1]}", f"target={tmp_path / 'out'}")  # a run's folder will do
    found, stored = tensors_of(tmp_path / "out"), weights(checkpoint)
    kinds = {name: tensor.dtype for name, tensor in found.items()}
    assert {name for name, kind in kinds.items() if kind == torch.float32} == {n for n in kinds if ".router." in n}
    head = found["lm_head.weight"]
    assert head.dtype == torch.bfloat16 and torch.equal(head, stored["lm_head.weight"].bfloat16())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_config_json_leaves_out_what_readers_count_twice(exports: Path) -> None:
    """An engine takes num_hidden_layers for the number of layers; rope_theta is where each reader looks for it."""
    for layout in ("released", "transformers"):
        tree = json.loads((exports / layout / "config.json").read_text())
        assert "num_hidden_layers" not in tree and (tree["num_layers"], tree["rope_theta"]) == (2, 1e6)
        assert layout == "released" or tree["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e6}


def test_export_says_who_cannot_serve_it(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On standard error: standard output has the folder alone."""
    capsys.readouterr()
    run_command("export", f"source={checkpoint}", f"target={tmp_path / 'out'}")
    printed = capsys.readouterr()
    assert printed.out == f"{tmp_path / 'out'}\n"
    latent, width = printed.err.splitlines()
    assert "kv_lora_rank + qk_rope_head_dim is 40" in latent and "320, 512, 576" in latent
    assert "multiple of 256" in width and "32" in width


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({}, []),
        ({"qk_rope_head_dim": 32, "kv_lora_rank": 288}, []),
        ({"qk_rope_head_dim": 32}, ["is 544"]),
        ({"hidden_size": 384}, ["multiple of 256, and it is 384"]),
        ({"hidden_size": 384, "num_zero_experts": 0, "expected_ffn_experts": 6}, []),
        ({"num_mtp_layers": 3}, ["first of its 3 MTP layers"]),
        ({"rope_scaling": RopeScaling(factor=4.0, original_max_position_embeddings=64)}, []),
        (
            {"rope_scaling": RopeScaling(factor=8.0, original_max_position_embeddings=64)},
            ["original_max_position_embeddings = 4 where this model has 8"],
        ),
    ],
)
def test_notes_on_serving(changes: dict[str, Any], fragments: list[str]) -> None:
    sizes = {"hidden_size": 512, "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    notes = serving_notes(ModelConfig(**(sizes | changes)), positions=256)
    assert len(notes) == len(fragments)
    assert all(fragment in note for fragment, note in zip(fragments, notes, strict=True))


def test_what_cannot_be_exported_is_refused(checkpoint: Path, corpus: Path, tmp_path: Path, refused: Refused) -> None:
    source, target = f"source={checkpoint}", f"target={tmp_path / 'out'}"
    (tmp_path / "there").mkdir()
    refused(["export", source], "target=DIR")
    refused(["export", source, f"target={tmp_path / 'there'}"], "not overwritten")
    refused(["export", source, target, "export.layout=gguf"], "released or transformers")
    refused(["export", source, target, "export.layot=released"], "'export.layout'")
    refused(["export", source, target, "export.shard_gib=big"], "a number")
    refused(["export", source, target, "export.dtype=fp8"], "bfloat16 or float32")
    refused(["export", source, target, "export.tokenizer=nowhere.json"], "nowhere.json", "export.tokenizer=FILE")
    refused(["export", f"source={corpus.parent}", target], "no readable manifest.json")
    refused(["export", f"source={tmp_path / 'nothing'}", target], "no folder")
    before = sorted(checkpoint.iterdir())
    refused(["export", source, f"target={checkpoint / 'hf'}"], f"is inside the checkpoint {checkpoint}")
    assert sorted(checkpoint.iterdir()) == before
    refused(["export", source, f"target={tmp_path / 'x.partial'}"], "half written")
    (tmp_path / "out.partial").mkdir()
    refused(["export", source, target], "out.partial")
    assert not (tmp_path / "out").exists() and not any((tmp_path / "there").iterdir())


def test_paths_of_options_may_begin_with_the_home_folder(
    checkpoint: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some shells expand ~ only where a word begins; a folder named ~ surprises."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(checkpoint)
    (tmp_path / "texts").symlink_to(corpus.parent)  # has the tokenizer.json
    run_command("export", "source=~/model", "target=~/out", "export.tokenizer=~/texts")
    assert (tmp_path / "out" / "tokenizer.json").is_file() and not (tmp_path / "~").exists()
    config = compose(["run.dir=~/runs", "checkpoint.resume=~/model"])
    assert config.run.folder == tmp_path / "runs" / "default"
    assert config.checkpoint.resume == str(tmp_path / "model")


def test_what_config_json_cannot_say_is_refused(corpus: Path, tmp_path: Path, refused: Refused) -> None:
    source = trained(corpus, tmp_path, "model.latent_norm_eps=1e-5")
    for layout in ("released", "transformers"):
        words = [f"source={source}", f"target={tmp_path / 'out'}", f"export.layout={layout}"]
        refused(["export", *words], "model.latent_norm_eps=1e-05", "no field", "1e-06")
    assert not (tmp_path / "out").exists()


def test_a_damaged_checkpoint_is_refused(corpus: Path, tmp_path: Path, refused: Refused) -> None:
    damaged = trained(corpus, tmp_path)
    shard = next(damaged.glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    refused(["export", f"source={damaged}", f"target={tmp_path / 'out'}"], shard.name, "hash")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
