"""Tokenizers: the bytes of each id."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from longcat.errors import ConfigError
from train.data.config import DataConfig
from train.data.tokens import (
    end_of_document_id,
    load_tokenizer,
    pieces,
    token_byte_lengths,
    tokenizer_path,
    train_bpe,
)

TEXTS = ["def f(x):\n    return x + 12345\n", "naïve café — 日本語 текст", "aaaa bbbb aaaa bbbb"] * 20


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 ids, trained on TEXTS."""
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(TEXTS, 400).save(str(path))
    return path


def test_bpe_has_the_requested_size_and_end_token_0(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    assert 257 < tokenizer.get_vocab_size() <= 400
    assert end_of_document_id(tokenizer, "it") == 0
    assert tokenizer.token_to_id("<|endoftext|>") == 0


def test_smallest_bpe_holds_only_the_bytes() -> None:
    assert train_bpe(TEXTS, 257).get_vocab_size() == 257
    with pytest.raises(ConfigError, match=r"model\.vocab_size=256 is too small"):
        train_bpe(TEXTS, 256)


def test_each_digit_is_one_token(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("x = 12345").ids
    assert pieces(tokenizer, ids)[-5:] == ["1", "2", "3", "4", "5"]


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=60))
def test_byte_lengths_sum_to_the_bytes_of_any_text(path: Path, text: str) -> None:
    tokenizer = load_tokenizer(path)
    tokenizer.encode_special_tokens = True
    lengths = token_byte_lengths(path, 512)
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert lengths[ids].sum() == len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_byte_lengths_of_special_and_unused_ids_are_0(path: Path) -> None:
    lengths = token_byte_lengths(path, 512)
    assert lengths.shape == (512,) and lengths.dtype == np.int64
    assert lengths[0] == 0 and (lengths[load_tokenizer(path).get_vocab_size() :] == 0).all()
    assert (lengths[1:257] == 1).all()


def test_byte_lengths_of_word_marks_and_byte_fallback(tmp_path: Path) -> None:
    vocabulary = {"</s>": 0, "<0xE2>": 1, "\u2581": 2, "é": 3, "\u2581é": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("\u2581", "é")], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert token_byte_lengths(tmp_path / "tokenizer.json", 6).tolist() == [0, 1, 1, 2, 3, 0]


def test_pieces_show_parts_of_characters_and_control_characters(path: Path) -> None:
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("é\x07\n" + "\N{GRINNING FACE}").ids
    shown = pieces(path, [0, *ids])
    assert shown[0] == "<|endoftext|>"
    assert "\u2407" in shown and "\n" in shown
    assert shown[-1] == "\ufffd"  # the last byte of an emoji of four bytes
    assert pieces(tokenizer, [511]) == ["<511>"]


def test_tokenizer_path_is_beside_the_first_corpus(path: Path) -> None:
    assert tokenizer_path(DataConfig("n", "s", paths=[str(path.parent / "corpus")])) == path
    assert tokenizer_path(DataConfig("n", "s", paths=["no/where/corpus"])) is None


def test_wrong_tokenizer_files_are_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"no": "tokenizer"}')
    with pytest.raises(ConfigError, match=r"not a tokenizer\.json"):
        load_tokenizer(tmp_path / "bad.json")
    with pytest.raises(ConfigError, match=r"model\.vocab_size=300"):
        token_byte_lengths(path, 300)


def test_tokenizer_without_end_token_or_bytes_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}))
    with pytest.raises(ConfigError, match="none of the end-of-document tokens"):
        end_of_document_id(words, "it")
    words.save(str(tmp_path / "words.json"))
    with pytest.raises(ConfigError, match="WordPiece"):
        token_byte_lengths(tmp_path / "words.json", 10)
