"""Tokenizers of others: their end-of-document token is found, and what their files ask for does not change texts."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors

from longcat.errors import ConfigError
from train.checkpoint.offline_reader import Checkpoint
from train.data.build import build
from train.data.config import DataConfig
from train.data.corpus import CorpusInfo
from train.data.samples import TokenSamples
from train.data.tokens import end_of_document_id, load_tokenizer, token_byte_lengths, train_bpe

TEXTS = [f"Document {i}: some words, {'more ' * i}<|endoftext|> and <s> naïve" for i in range(20)]
VOCABULARY = 400


def with_end(folder: Path, name: str) -> Path:
    """A tokenizer.json whose only special token is ``name``."""
    folder.mkdir(parents=True, exist_ok=True)
    train_bpe(TEXTS, 300, name).save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def build_with(tokenizer: Path, tmp_path: Path, **more: Any) -> CorpusInfo:
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = DataConfig(
        "x", str(tmp_path / "text.jsonl"), out=str(tmp_path / "out"), tokenizer=str(tokenizer), overwrite=True, **more
    )
    return build(config, VOCABULARY)


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("tokenizer_config.json", {"eos_token": "<END>"}),
        ("tokenizer_config.json", {"eos_token": {"content": "<END>", "special": True}}),
        ("special_tokens_map.json", {"eos_token": "<END>"}),
        ("special_tokens_map.json", {"eos_token": {"content": "<END>", "lstrip": False}}),
        ("generation_config.json", {"eos_token_id": 0}),
        ("generation_config.json", {"eos_token_id": [0, 7]}),
        ("config.json", {"eos_token_id": 0}),
    ],
)
def test_end_token_is_read_beside_the_tokenizer(file: str, value: dict[str, Any], tmp_path: Path) -> None:
    path = with_end(tmp_path / "t", "<END>")
    with pytest.raises(ConfigError, match=r"no file beside it names one; name it with data\.eos_token"):
        build_with(path, tmp_path)
    write(path.parent / file, value)
    assert build_with(path, tmp_path).eod == 0
    # where the corpus is, nothing but its corpus.json knows the token
    beside = tmp_path / "out" / "tokenizer.json"
    assert end_of_document_id(load_tokenizer(beside), beside) == 0


@pytest.mark.parametrize("name", ["</longcat_s>", "<｜end▁of▁sentence｜>", "<|endoftext|>", "</s>"])
def test_known_end_tokens_need_no_file(name: str, tmp_path: Path) -> None:
    assert build_with(with_end(tmp_path / "t", name), tmp_path).eod == 0


def test_key_names_the_token_and_wins(tmp_path: Path) -> None:
    path = with_end(tmp_path / "t", "<|endoftext|>")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(path))
    write(path.parent / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    last = tokenizer.token_to_id("<|im_end|>")
    assert build_with(path, tmp_path).eod == last
    assert build_with(path, tmp_path, eos_token="<|endoftext|>").eod == 0
    with pytest.raises(ConfigError, match=r"has no token <no>; correct data\.eos_token"):
        build_with(path, tmp_path, eos_token="<no>")
    with pytest.raises(ConfigError, match=r"data\.eos_token is empty"):
        build_with(path, tmp_path, eos_token="")


def test_checkpoints_know_the_token_of_their_build(tmp_path: Path) -> None:
    """`generate` and `export` end documents as training did, whatever the tokenizer's own folder names."""
    path = with_end(tmp_path / "t", "<|endoftext|>")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(path))
    write(path.parent / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    assert build_with(path, tmp_path, eos_token="<|endoftext|>").eod == 0
    data = {"tokenizer": str(path), "paths": [str(tmp_path / "out" / "corpus")]}
    checkpoint = object.__new__(Checkpoint)  # only the configuration is asked
    checkpoint.configuration = {"data": {**data, "eos_token": None}}
    assert checkpoint.end_of_document(path) == 0
    checkpoint.configuration = {"data": {**data, "eos_token": "<|im_end|>"}}
    assert checkpoint.end_of_document(path) == tokenizer.token_to_id("<|im_end|>")
    checkpoint.configuration = {"data": {**data, "paths": [str(tmp_path / "gone" / "corpus")]}}
    assert checkpoint.end_of_document(path) == tokenizer.token_to_id("<|im_end|>"), "as the files beside it say"


def test_key_names_the_token_of_a_trained_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    config = DataConfig("x", str(tmp_path / "a.txt"), out=str(tmp_path / "out"), eos_token="<END>")
    build(config, VOCABULARY)
    assert load_tokenizer(tmp_path / "out" / "tokenizer.json").id_to_token(0) == "<END>"
    with pytest.raises(ConfigError, match="eos_token <END> instead of None"):
        build(DataConfig("x", str(tmp_path / "a.txt"), out=str(tmp_path / "out")), VOCABULARY)


def test_token_that_the_tokenizer_lacks_is_passed_over(tmp_path: Path) -> None:
    path = with_end(tmp_path / "t", "</s>")
    write(path.parent / "tokenizer_config.json", {"eos_token": "<gone>"})
    write(path.parent / "config.json", {"eos_token_id": 99_999})
    (path.parent / "generation_config.json").write_text("{ damaged")
    assert end_of_document_id(load_tokenizer(path), path) == 0


def test_folder_of_a_model_is_a_tokenizer(tmp_path: Path) -> None:
    path = with_end(tmp_path / "t", "</s>")
    assert build_with(path.parent, tmp_path).eod == 0


def truncating(tokenizer: Tokenizer) -> None:
    tokenizer.enable_truncation(5)


def padding(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(length=64, pad_id=1, pad_token="!")


def adding(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A </s>", special_tokens=[("</s>", 0)])


def adding_a_space(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


def lowering(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Lowercase()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (truncating, "truncation in"),
        (padding, "padding in"),
        (adding, "adds </s> </s> to a text"),
        (adding_a_space, "does not give all text back: 20 of 20"),
        (lowering, "to 'document 0: some wor' for 'Document 0: some wor'"),
    ],
)
def test_build_and_use_give_the_same_ids(
    change: Callable[[Tokenizer], None], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A prompt gives the ids that the same text has in the corpus; what is unusual is said."""
    path = with_end(tmp_path / "t", "</s>")
    tokenizer = Tokenizer.from_file(str(path))
    change(tokenizer)
    tokenizer.save(str(path))
    info = build_with(path, tmp_path)
    assert said in " ".join(capsys.readouterr().err.split())
    ids = np.fromfile(tmp_path / "out" / "corpus.bin", dtype=np.uint16)
    documents = [part[:-1].tolist() for part in np.split(ids, np.flatnonzero(ids == info.eod) + 1)[:-1]]
    prompts = load_tokenizer(tmp_path / "out" / "tokenizer.json").encode_batch(TEXTS, add_special_tokens=False)
    assert documents == [prompt.ids for prompt in prompts]
    assert len(documents) == len(TEXTS)
    if change in (truncating, padding, adding):
        lengths = token_byte_lengths(tmp_path / "out" / "tokenizer.json", VOCABULARY)
        assert int(lengths[ids].sum()) == info.bytes == sum(len(text.encode()) for text in TEXTS)


def test_ordinary_tokenizer_is_not_remarked_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build_with(with_end(tmp_path / "t", "</s>"), tmp_path)
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_byte_order_mark_of_a_tokenizer_is_named(tmp_path: Path) -> None:
    path = with_end(tmp_path / "t", "</s>")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with pytest.raises(ConfigError, match="starts with a byte-order mark; save it as UTF-8 without one"):
        build_with(path, tmp_path)


def test_another_tokenizer_beside_a_corpus_is_refused(tmp_path: Path) -> None:
    info = build_with(with_end(tmp_path / "t", "</s>"), tmp_path)
    assert info.documents == len(TEXTS)
    config = DataConfig("x", "s", paths=[str(tmp_path / "out" / "corpus")], validation_fraction=0.2)
    arguments: dict[str, Any] = {"sequence_length": 8, "seed": 0, "vocab_size": VOCABULARY, "split": "train"}
    TokenSamples(config, cache_dir=tmp_path / "index", **arguments)
    train_bpe(TEXTS, 270, "</s>").save(str(tmp_path / "out" / "tokenizer.json"))
    with pytest.raises(ConfigError, match="is not the tokenizer that the corpus"):
        TokenSamples(config, cache_dir=tmp_path / "index", **arguments)


@pytest.mark.parametrize("unit", ["a", "xyzAB", " ", "7", "=-", "漢字", "\n"])
def test_document_without_a_break_builds_in_bounded_time(unit: str, tmp_path: Path) -> None:
    """2 MB: by merging inside one word the trainer would take more than an hour."""
    (tmp_path / "a.txt").write_text(unit * (2_000_000 // len(unit.encode())))
    began = time.monotonic()
    info = build(DataConfig("x", str(tmp_path / "a.txt"), out=str(tmp_path / "out")), VOCABULARY)
    assert info.bytes == len((tmp_path / "a.txt").read_bytes())
    assert time.monotonic() - began < 60
