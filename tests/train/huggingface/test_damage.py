"""Damaged exports: a changed byte in any file is refused, or changes nothing of what is imported."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from longcat.errors import ConfigError
from tests.support.exporting import run_command
from tests.support.fixtures import Refused
from train.checkpoint.offline_reader import full_box, stored_shapes
from train.config import Config
from train.huggingface import import_folder as import_module
from train.huggingface.import_folder import configuration_of
from train.huggingface.safetensors_folder import SafetensorsFolder

READ = ("config.json", "longcat.json", "tokenizer.json", "model.safetensors.index.json")
COUNT = int(os.environ.get("LONGCAT_MUTATIONS", "20000"))  # of the long test


@pytest.fixture(scope="module")
def export(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "bfloat16"
    run_command("export", f"source={checkpoint}", f"target={folder}", "export.shard_gib=0.0001")
    return folder


def read_all(folder: Path) -> tuple[Config, dict[str, Tensor]]:
    """What an import makes a checkpoint of: the configuration and every tensor."""
    source = SafetensorsFolder(folder)
    config = configuration_of(source, [])
    source.check(config.model)
    return config, {name: source.read(name, shape, full_box(shape)) for name, shape in stored_shapes(config.model)}


@pytest.fixture
def _composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compose each list of overrides once: a fifth of a second, while most damage leaves the sizes as they are."""
    plain = import_module.compose
    known: dict[tuple[str, ...], Config] = {}

    def compose(words: list[str]) -> Config:
        if tuple(words) not in known:
            known[tuple(words)] = plain(words)
        return copy.deepcopy(known[tuple(words)])

    monkeypatch.setattr(import_module, "compose", compose)


def assert_damage_is_found(export: Path, folder: Path, count: int, seed: int) -> dict[str, int]:
    """Change ``count`` random bytes of a copy in ``folder``, one at a time; returns the refusals by file."""
    shutil.copytree(export, folder)
    config, tensors = read_all(folder)
    draw = random.Random(seed)
    files = [folder / name for name in READ] + sorted(folder.glob("*.safetensors"))
    refused: dict[str, int] = {}
    for _ in range(count):
        path = draw.choice(files)
        content = path.read_bytes()
        position = draw.randrange(len(content) if draw.random() < 0.5 else min(len(content), 2000))
        changed = bytes([draw.choice([byte for byte in range(256) if byte != content[position]])])
        path.write_bytes(content[:position] + changed + content[position + 1 :])
        try:
            after, values = read_all(folder)
        except ConfigError:
            kind = "safetensors" if path.suffix == ".safetensors" else path.name
            refused[kind] = refused.get(kind, 0) + 1
        else:
            where = f"byte {position} of {path.name}: {content[position : position + 1]!r} → {changed!r}"
            assert after == config, where
            assert all(torch.equal(values[name], tensors[name]) for name in tensors), where
        path.write_bytes(content)
    return refused


@pytest.mark.usefixtures("_composed_once")
def test_changed_bytes_are_found_or_harmless(export: Path, tmp_path: Path) -> None:
    refused = assert_damage_is_found(export, tmp_path / "copy", 300, seed=0)
    assert min(refused[name] for name in ("safetensors", *READ)) > 0, refused


@pytest.mark.long
@pytest.mark.usefixtures("_composed_once")
def test_many_changed_bytes_are_found_or_harmless(export: Path, tmp_path: Path) -> None:
    refused = assert_damage_is_found(export, tmp_path / "copy", COUNT, seed=1)
    print(f"{sum(refused.values())} of {COUNT} changed bytes refused, the others changed nothing: {refused}")


def test_one_changed_weight_is_refused_by_name(export: Path, tmp_path: Path, refused: Refused) -> None:
    """By import and by generate; without our record there is nothing to compare with."""
    shutil.copytree(export, tmp_path / "copy")
    path = tmp_path / "copy" / json.loads((export / READ[3]).read_text())["weight_map"]["lm_head.weight"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    words = [f"source={tmp_path / 'copy'}", f"target={tmp_path / 'out'}"]
    refused(["import", *words], path.name, "has changed since the export", "longcat.json")
    refused(["generate", words[0], "prompt=x"], path.name, "has changed since the export")
    (tmp_path / "copy" / "longcat.json").unlink()
    run_command("import", *words, "model.expected_ffn_experts=2")


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        ('"expected_ffn_experts": 2', '"expected_ffn_experts": 3', "its own hash"),
        ('"hidden_std": 0.15', '"hidden_std": 0.25', "its own hash"),
        ('"xxh3_128": "', '"xxh3_129": "', "damaged or of another version"),
        ('"top_k": 3', '"top_q": 3', "unknown size top_q"),
        ('"model": {', '"model": [', "cannot be read"),
    ],
)
def test_a_changed_record_is_refused(
    old: str, new: str, part: str, export: Path, tmp_path: Path, refused: Refused
) -> None:
    shutil.copytree(export, tmp_path / "copy")
    path = tmp_path / "copy" / "longcat.json"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    refused(["import", f"source={tmp_path / 'copy'}", f"target={tmp_path / 'out'}"], "longcat.json", part)


def test_another_tokenizer_is_refused(export: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copytree(export, tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer.json"
    tree = json.loads(path.read_text())
    first, second, *_ = sorted(tree["model"]["vocab"], key=tree["model"]["vocab"].get)[300:]
    tree["model"]["vocab"] |= {first: 301, second: 300}  # two ids exchanged
    path.write_text(json.dumps(tree))
    words = ["import", f"source={tmp_path / 'copy'}", f"target={tmp_path / 'out'}"]
    refused(words, "tokenizer.json has changed since the export")
    refused(["generate", words[1], "prompt=x"], "tokenizer.json has changed since the export", "tokenizer=FILE")
    run_command("generate", words[1], "prompt=x", "max_tokens=2", f"tokenizer={export / 'tokenizer.json'}")
    run_command(*words, f"data.tokenizer={export / 'tokenizer.json'}")


def test_exports_of_before_the_hashes_are_imported(export: Path, tmp_path: Path) -> None:
    shutil.copytree(export, tmp_path / "copy")
    path = tmp_path / "copy" / "longcat.json"
    tree = json.loads(path.read_text())
    model = {name: value for name, value in tree["model"].items() if name != "rope_scaling"}
    path.write_text(json.dumps({"model": model, "layout": tree["layout"], "counters": tree["counters"]}))
    run_command("import", f"source={tmp_path / 'copy'}", f"target={tmp_path / 'out'}")


def test_a_name_that_occurs_twice_is_refused(export: Path, tmp_path: Path, refused: Refused) -> None:
    shutil.copytree(export, tmp_path / "copy")
    path = tmp_path / "copy" / "config.json"
    path.write_text(path.read_text().replace("{", '{"vocab_size": 9,', 1))
    words = ["import", f"source={tmp_path / 'copy'}", f"target={tmp_path / 'out'}"]
    refused(words, "config.json", "vocab_size occurs twice")
