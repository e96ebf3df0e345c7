"""Tokenizers: training a byte-level BPE, loading one, and the text of each id."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longcat.errors import ConfigError
from train.data.config import DataConfig
from train.data.corpus import END_OF_DOCUMENT, INFO_NAME, TOKENIZER_NAME, file_sha256

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MIN_VOCAB_SIZE = 257  # one id for each byte, one for the end of a document
_END_NAMES = (
    *(END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]"),
    *("</longcat_s>", "<｜end▁of▁sentence｜>"),  # of LongCat-Flash and DeepSeek
)
# Files beside a tokenizer.json that name its last token, the most specific first
_TOKEN_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_ID_FILES = ("generation_config.json", "config.json")
# Longer runs than words are: the trainer's time grows with the square of their length, and they teach it little.
_LONG_RUN = re.compile(r"(?<!\w)\w{257,}|(?<!\s)\s{257,}|(?<![^\w\s])[^\w\s]{257,}")
_RUN_PIECE, _RUN_KEPT = 256, 1 << 16  # characters: of a piece of such a run, and of the run
_BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_MARK = "\u2581"  # stands for a space in Metaspace vocabularies


def train_bpe(texts: Iterable[str], vocab_size: int, end: str = END_OF_DOCUMENT) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` ids; id 0 is `end` of a document, each digit is a token.

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
        special_tokens=[end],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_without_long_runs(texts), trainer)
    return tokenizer


def _without_long_runs(texts: Iterable[str]) -> Iterator[str]:
    """``texts``, with runs without a break cut into pieces and to their first `_RUN_KEPT` characters."""
    for text in texts:
        start = 0
        for run in _LONG_RUN.finditer(text):
            yield text[start : run.start()]
            kept = run[0][:_RUN_KEPT]
            yield from (kept[cut : cut + _RUN_PIECE] for cut in range(0, len(kept), _RUN_PIECE))
            start = run.end()
        yield text[start:]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a `tokenizer.json` such that `encode(text, add_special_tokens=False)` gives the ids of the text itself.

    Truncation and padding, which the file may ask for, are off, and text that looks like a special token is text.

    Raises:
        ConfigError: it is missing or is no tokenizer.
    """
    from tokenizers import Tokenizer

    file = Path(path)
    if not file.is_file():
        raise ConfigError(f"the tokenizer {file} does not exist; give the path of a tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception for whatever it cannot parse
        if file.read_bytes().startswith(codecs.BOM_UTF8):
            raise ConfigError(f"{file} starts with a byte-order mark; save it as UTF-8 without one") from error
        raise ConfigError(f"{file} is not a tokenizer.json ({' '.join(str(error).split())}); give another") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def num_ids(tokenizer: Tokenizer) -> int:
    """The highest id plus one: some vocabularies have gaps."""
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def end_of_document_id(tokenizer: Tokenizer, path: str | Path, name: str | None = None) -> int:
    """Id of the token that ends a document.

    Args:
        path: the tokenizer.json; files beside it may name the token.
        name: the token (`data.eos_token`); None = find it.

    Raises:
        ConfigError: the tokenizer does not have ``name``, or nothing names a token.
    """
    if name is not None:
        token_id = tokenizer.token_to_id(name)
        if token_id is None:
            raise ConfigError(f"{path} has no token {name}; correct data.eos_token")
        return int(token_id)
    for found in (*_named_beside(Path(path).parent, tokenizer, Path(path)), *map(tokenizer.token_to_id, _END_NAMES)):
        if found is not None:
            return int(found)
    raise ConfigError(
        f"{path} has none of the end-of-document tokens {', '.join(_END_NAMES)}, and no file beside it names one; name "
        f"it with data.eos_token"
    )


def _named_beside(folder: Path, tokenizer: Tokenizer, path: Path) -> Iterator[int | None]:
    """The ids that the files beside a tokenizer.json name, if the tokenizer has them."""
    info = _read_json(folder / INFO_NAME)  # of a corpus: the token that its build used
    if isinstance(info.get("eod"), int) and path.is_file() and info.get("tokenizer_sha256") == file_sha256(path):
        yield info["eod"]
    for file in _TOKEN_FILES:
        token = _read_json(folder / file).get("eos_token")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            yield tokenizer.token_to_id(token)
    for file in _ID_FILES:
        ids = _read_json(folder / file).get("eos_token_id")
        for token_id in ids if isinstance(ids, list) else [ids]:
            if isinstance(token_id, int) and tokenizer.id_to_token(token_id) is not None:
                yield token_id


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a file; empty if there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def text_changes(tokenizer: Tokenizer, texts: list[str], path: str | Path) -> list[str]:
    """Sentences on how a tokenizer changes text: what its ids decode to, and what its file asks for.

    Args:
        texts: examples, which are encoded and decoded again.
        path: the tokenizer.json.
    """
    found = []
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    decoded = tokenizer.decode_batch([encoding.ids for encoding in encodings], skip_special_tokens=False)
    wrong = [pair for pair in zip(texts, decoded, strict=True) if pair[0] != pair[1]]
    if wrong:
        text, back = wrong[0]
        place = next((n for n, (a, b) in enumerate(zip(text, back, strict=False)) if a != b), min(len(text), len(back)))
        start = max(0, place - 10)
        found.append(
            f"{path} does not give all text back: {len(wrong)} of {len(texts)} documents decode to other text, the "
            f"first one to {back[start : place + 20]!r} for {text[start : place + 20]!r}"
        )
    spec = _read_json(Path(path))
    ignored = [key for key in ("truncation", "padding") if spec.get(key)]
    if ignored:
        found.append(f"{' and '.join(ignored)} in {path} are ignored: texts are whole")
    if added := added_tokens(tokenizer):
        found.append(f"{path} adds {' '.join(added)} to a text; the corpus has only the end of a document, behind each")
    return found


def added_tokens(tokenizer: Tokenizer) -> list[str]:
    """The tokens that a tokenizer's post-processor adds to a text, which training leaves out."""
    return [token for token in tokenizer.encode("", add_special_tokens=True).tokens if token]


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
