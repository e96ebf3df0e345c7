"""Tokenizers: training a byte-level BPE, loading one, and the text of each id."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longcat.errors import ConfigError
from train.data.config import DataConfig
from train.data.corpus import END_OF_DOCUMENT, TOKENIZER_NAME

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MIN_VOCAB_SIZE = 257  # one id for each byte, one for the end of a document
_END_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_MARK = "\u2581"  # stands for a space in Metaspace vocabularies


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` ids; id 0 ends a document, each digit is a token.

    Raises:
        ConfigError: `vocab_size` is too small for the 256 bytes and the end-of-document token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab_size < MIN_VOCAB_SIZE:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is too small for a byte-level BPE; use at least {MIN_VOCAB_SIZE}"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
        ConfigError: it is missing or is no tokenizer.
    """
    from tokenizers import Tokenizer

    if not Path(path).is_file():
        raise ConfigError(f"the tokenizer {path} does not exist; give the path of a tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for whatever it cannot parse
        raise ConfigError(f"{path} is not a tokenizer.json ({' '.join(str(error).split())}); give another") from error


def end_of_document_id(tokenizer: Tokenizer, where: str) -> int:
    """Id of the token that ends a document.

    Raises:
        ConfigError: the tokenizer has none of the usual names.
    """
    for name in _END_NAMES:
        token_id = tokenizer.token_to_id(name)
        if token_id is not None:
            return int(token_id)
    raise ConfigError(
        f"{where} has none of the end-of-document tokens {', '.join(_END_NAMES)}; add one to the tokenizer"
    )


def tokenizer_path(config: DataConfig) -> Path | None:
    """The `tokenizer.json` beside the first of `data.paths`; None if it does not exist."""
    path = Path(config.paths[0]).parent / TOKENIZER_NAME
    return path if path.is_file() else None


def byte_alphabet() -> dict[str, int]:
    """Character → byte of byte-level pieces: printable Latin-1 is itself, the rest moves above 255."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in set(kept)]
    return {chr(byte): byte for byte in kept} | {chr(256 + i): byte for i, byte in enumerate(moved)}


def token_byte_lengths(path: str | Path, vocab_size: int) -> np.ndarray:
    """UTF-8 bytes of the text of each id, int64 [vocab_size]; 0 for special and unused ids.

    A piece of a multi-byte character counts its own bytes, so the lengths of a text sum to its bytes (except leading
    spaces that a tokenizer adds).

    Raises:
        ConfigError: the tokenizer has more ids than `vocab_size`, or pieces of a kind without known bytes.
    """
    lengths = np.zeros(vocab_size, dtype=np.int64)
    for token_id, text in _token_bytes(Path(path)).items():
        if token_id >= vocab_size:
            raise ConfigError(
                f"{path} has the id {token_id} but model.vocab_size={vocab_size}; raise model.vocab_size past it"
            )
        lengths[token_id] = 0 if text is None else len(text)
    return lengths


def pieces(tokenizer: Tokenizer | str | Path, ids: Sequence[int] | np.ndarray) -> list[str]:
    """The text of each id for display: invalid bytes become U+FFFD, control characters symbols.

    Line feeds and tabs stay; a special token appears by its name.
    """
    if isinstance(tokenizer, (str, Path)):
        tokenizer = load_tokenizer(tokenizer)
    table = _bytes_by_id(json.loads(tokenizer.to_str()), "the tokenizer")
    shown = []
    for token_id in (int(number) for number in ids):
        text = table.get(token_id)
        name = tokenizer.id_to_token(token_id)
        decoded = (name or f"<{token_id}>") if text is None else text.decode("utf-8", errors="replace")
        shown.append("".join(_visible(character) for character in decoded))
    return shown


def _visible(character: str) -> str:
    code = ord(character)
    return chr(0x2400 + code) if code < 32 and character not in "\n\t" else character


def _token_bytes(path: Path) -> dict[int, bytes | None]:
    load_tokenizer(path)  # its errors are clearer than those of a damaged JSON
    return _bytes_by_id(json.loads(path.read_text(encoding="utf-8")), str(path))


def _bytes_by_id(spec: dict[str, Any], where: str) -> dict[int, bytes | None]:
    """Id → its bytes; None for special tokens."""
    model = spec["model"]
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram models list [piece, score]
        vocabulary = {piece: number for number, (piece, _) in enumerate(vocabulary)}
    table: dict[int, bytes | None]
    kinds = set(_types(spec.get("pre_tokenizer"))) | set(_types(spec.get("decoder")))
    if "ByteLevel" in kinds:
        alphabet = byte_alphabet()
        table = {number: _from_alphabet(piece, alphabet) for piece, number in vocabulary.items()}
    elif model["type"] in ("BPE", "Unigram"):
        table = {number: _from_words(piece) for piece, number in vocabulary.items()}
    else:
        raise ConfigError(f"{where} is a {model['type']} model; bytes are known for byte-level, BPE and Unigram ones")
    for token in spec.get("added_tokens", []):
        table[token["id"]] = None if token["special"] else token["content"].encode("utf-8")
    return table


def _types(node: Any) -> Iterator[str]:
    """The `type` of a component of a tokenizer and of all inside it."""
    if isinstance(node, dict):
        yield node.get("type", "")
        for value in node.values():
            yield from _types(value)
    elif isinstance(node, list):
        for value in node:
            yield from _types(value)


def _from_alphabet(piece: str, alphabet: dict[str, int]) -> bytes:
    if all(character in alphabet for character in piece):
        return bytes(alphabet[character] for character in piece)
    return piece.encode("utf-8")  # not written in the alphabet: a token that was added as plain text


def _from_words(piece: str) -> bytes:
    fallback = _BYTE_FALLBACK.fullmatch(piece)
    if fallback:
        return bytes([int(fallback.group(1), 16)])
    return piece.replace(_WORD_MARK, " ").encode("utf-8")
