"""`longcat data build`: a source and a tokenizer → `.bin`, `.idx`, `tokenizer.json` and `corpus.json`."""

from __future__ import annotations

import fcntl
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from longcat.errors import ConfigError
from train.checkpoint.files import file_hash, sync_file, sync_folder
from train.data.blocks import SUFFIX, write_block_hashes
from train.data.config import PYTHON_SOURCE, TOKENIZER_NAME, DataConfig
from train.data.corpus import INFO_NAME, CorpusInfo, file_sha256, verify_corpus, write_info
from train.data.sources import Source
from train.data.tokens import (
    END_OF_DOCUMENT,
    MIN_VOCAB_SIZE,
    end_of_document_id,
    load_tokenizer,
    num_ids,
    text_changes,
    train_bpe,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BATCH_BYTES = 4_000_000
_BATCH_DOCUMENTS = 1024
_FILES = ("corpus.bin", "corpus.idx", f"corpus{SUFFIX}", TOKENIZER_NAME, INFO_NAME)  # as they are moved into place
_COMPARED, _COMPARED_LENGTH = 64, 10_000  # documents whose ids are decoded again, and their longest length
_REPORT_SECONDS = 30.0  # between lines of progress where there is no terminal
_PLAIN: dict[str, Any] = {"highlight": False, "soft_wrap": True, "markup": False}
_PACKAGES = ("datasets", "tokenizers", "megatron-core", "numpy")


def build(config: DataConfig, vocab_size: int) -> CorpusInfo:
    """Build the corpus `<data.out>/corpus` and its `tokenizer.json` from `data.source`.

    The corpus is `.bin` and `.idx` in Megatron's format, `.xxh3` with hashes of the `.bin`, and `.json`, its
    description.

    The text is streamed twice: once to train the tokenizer (the first `data.tokenizer_bytes`), once to encode
    it. No file has its final name before all are on disk; `corpus.json` comes last. A finished corpus of
    the same settings is not built again.

    Args:
        vocab_size: largest number of ids that the tokenizer may have (`model.vocab_size`).

    Raises:
        ConfigError: the source cannot be read, or `data.out` holds another corpus and `data.overwrite` is
        false.
    """
    config.validate()
    settings = _settings(config, vocab_size)
    out = Path(config.out)
    console = Console(stderr=True)
    finished = _finished(config, out, settings)
    if finished is not None:
        console.print(f"{out}/corpus exists already: {_summary(finished)}", **_PLAIN)
        return finished
    try:
        with _new_folder(out / f".building-{os.getpid()}") as temporary:
            info, notes = _write(config, vocab_size, settings, temporary, console)
            with _only_one(out):
                if _finished(config, out, settings) is None:  # another build may have ended meanwhile
                    _put_in_place(temporary, out)
    except OSError as error:
        raise ConfigError(f"data.out={out} cannot be written ({error}); free space or give another folder") from error
    console.print(f"{out}/corpus: {_summary(info)} in {info.seconds:.1f} s", **_PLAIN)
    for line in notes:
        console.print(line, **_PLAIN)
    return info


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A new folder, which goes at the end; so do the folders made for it that are still empty."""
    made = [folder, *(above for above in folder.parents if not above.exists())]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for above in made[1:]:
            with suppress(OSError):  # not empty
                above.rmdir()


def _summary(info: CorpusInfo) -> str:
    files = f" from {info.files:,} file{'s' if info.files > 1 else ''}" if info.files else ""
    return (
        f"{info.tokens:,} tokens, {info.documents:,} documents{files}, {info.bytes:,} bytes "
        f"({info.bytes_per_token:.2f} per token), vocabulary {info.vocab_size:,}"
    )


def _settings(config: DataConfig, vocab_size: int) -> dict[str, Any]:
    """The configuration keys that decide the result."""
    keys = ("source", "text_field", "split", "subset", "max_bytes")
    settings: dict[str, Any] = {key: getattr(config, key) for key in keys} | {"vocab_size": vocab_size}
    if config.eos_token is not None:
        settings["eos_token"] = config.eos_token
    if config.tokenizer is None:
        return settings | {"tokenizer_bytes": config.tokenizer_bytes}
    if not Path(config.tokenizer).is_file():
        raise ConfigError(
            f"data.tokenizer={config.tokenizer} does not exist; give a tokenizer.json, or null to train one"
        )
    return settings | {"tokenizer": file_sha256(Path(config.tokenizer))}


def _finished(config: DataConfig, out: Path, settings: dict[str, Any]) -> CorpusInfo | None:
    """The existing corpus, if it is complete and has the same settings.

    Raises:
        ConfigError: something else exists and must not be overwritten.
    """
    existing = [name for name in _FILES if (out / name).exists()]
    if not existing or config.overwrite:
        return None
    cure = "give another data.out, or data.overwrite=true to replace it"
    if INFO_NAME not in existing:
        raise ConfigError(f"data.out={out} holds {', '.join(existing)} of an unfinished build; {cure}")
    prefix = out / "corpus"
    info = verify_corpus(prefix)
    if info is None or info.settings != settings:
        old = {} if info is None else info.settings
        changed = sorted(key for key in settings.keys() | old.keys() if settings.get(key) != old.get(key))
        changes = ", ".join(f"{key} {old.get(key)} instead of {settings.get(key)}" for key in changed)
        raise ConfigError(f"data.out={out} holds a corpus of other settings ({changes}); {cure}")
    return info


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    """One build at a time is inside; where the file system has no locks, all are."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, out: Path) -> None:
    for name in _FILES:
        sync_file(temporary / name)  # before the rename: else a power cut could leave the name without the contents
    (out / INFO_NAME).unlink(missing_ok=True)  # from now on an old corpus does not count as finished
    for name in _FILES:
        os.replace(temporary / name, out / name)
    sync_folder(out)


def _write(
    config: DataConfig, vocab_size: int, settings: dict[str, Any], folder: Path, console: Console
) -> tuple[CorpusInfo, list[str]]:
    """Write `_FILES` into `folder`; returns what corpus.json says, and lines for the user."""
    began = time.perf_counter()
    if config.tokenizer is None and vocab_size < MIN_VOCAB_SIZE:
        train_bpe([], vocab_size)  # raises, before anything is read
    with _progress(console) as progress:
        source = Source(config)
        tokenizer = _tokenizer(config, vocab_size, source, progress)
        if config.tokenizer is None:
            tokenizer.save(str(folder / TOKENIZER_NAME))
        else:  # unchanged: a checkpoint knows its tokenizer by the hash
            shutil.copyfile(config.tokenizer, folder / TOKENIZER_NAME)
        path = config.tokenizer or folder / TOKENIZER_NAME
        totals = _Totals(eod=end_of_document_id(tokenizer, path, config.eos_token))
        _encode(config, source, tokenizer, folder, totals, progress)
    corpus = folder / "corpus"
    info = CorpusInfo(
        documents=totals.documents,
        tokens=totals.tokens,
        bytes=totals.bytes,
        vocab_size=num_ids(tokenizer),
        max_token_id=totals.max_token_id,
        eod=totals.eod,
        source=config.source,
        tokenizer_sha256=file_sha256(folder / TOKENIZER_NAME),
        settings=settings,
        versions=_versions(config),
        seconds=time.perf_counter() - began,
        files=0 if source.num_files is None else source.counts.files,
        hashes={
            ".idx": file_hash(corpus.with_suffix(".idx")),
            SUFFIX: write_block_hashes(corpus.with_suffix(".bin"), corpus.with_suffix(SUFFIX)),
        },
    )
    write_info(folder / INFO_NAME, info)
    return info, [*_left_out(config, source, totals.bytes), *totals.changed]


def _left_out(config: DataConfig, source: Source, num_bytes: int) -> list[str]:
    """Lines that say what of the source is not in the corpus as it was."""
    counts, lines = source.counts, []
    if config.max_bytes and num_bytes >= config.max_bytes:
        where = "" if source.num_files is None else f" in file {counts.files:,} of {source.num_files:,}"
        lines.append(f"reading stopped at data.max_bytes={config.max_bytes}{where}; data.max_bytes=0 reads all")
    if source.left_out:
        lines.append(f"not read: {source.left_out}; name such files with a glob in data.source")
    if counts.empty:
        lines.append(f"left out: {counts.empty:,} rows without text in the field {config.text_field}")
    if counts.with_zeros:
        lines.append(
            f"in {counts.with_zeros:,} documents are zero characters: are their files UTF-16 without a byte-order "
            f"mark, or no text?"
        )
    if counts.not_unicode:
        lines.append(f"in {counts.not_unicode:,} documents half surrogate pairs, which are no text, became U+FFFD")
    return lines


def _tokenizer(config: DataConfig, vocab_size: int, source: Source, progress: Progress) -> Tokenizer:
    if config.tokenizer is not None:
        tokenizer = load_tokenizer(config.tokenizer)
        size = num_ids(tokenizer)
        if size > vocab_size:
            raise ConfigError(
                f"data.tokenizer={config.tokenizer} has {size} ids but model.vocab_size={vocab_size}; raise "
                f"model.vocab_size to {size} or give a smaller tokenizer"
            )
        return tokenizer
    limits = [limit for limit in (config.tokenizer_bytes, config.max_bytes) if limit]
    limit = min(limits, default=0)
    task = progress.add_task("training the tokenizer", total=limit or None)
    texts = _counted(source.texts(limit), progress, task)
    tokenizer = train_bpe(texts, vocab_size, config.eos_token or END_OF_DOCUMENT)
    progress.update(task, description="tokenizer trained")
    return tokenizer


@dataclass
class _Totals:
    """Counts of an encoding."""

    eod: int
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    max_token_id: int = 0
    changed: list[str] = field(default_factory=list)  # what the tokenizer changes in the text, in words


def _encode(
    config: DataConfig,
    source: Source,
    tokenizer: Tokenizer,
    folder: Path,
    totals: _Totals,
    progress: Progress,
) -> None:
    """Encode all documents in batches and write `corpus.bin` and `corpus.idx`."""
    from train.data.megatron_index import megatron_builder  # megatron-core: seconds

    dtype = np.uint16 if num_ids(tokenizer) <= 1 << 16 else np.int32
    builder = megatron_builder(str(folder / "corpus.bin"), dtype)
    tokenizer.encode_special_tokens = True  # text that looks like a special token is not the end of a document
    task = progress.add_task("encoding", total=config.max_bytes or None)
    for batch in _batches(_counted(source.texts(config.max_bytes), progress, task)):
        if totals.documents == 0 and config.tokenizer is not None:
            compared = [text[:_COMPARED_LENGTH] for text in batch[:_COMPARED]]
            totals.changed = text_changes(tokenizer, compared, config.tokenizer)
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            ids = np.array([*encoding.ids, totals.eod], dtype=dtype)
            builder.add_document(ids, [len(ids)])
            totals.documents += 1
            totals.tokens += len(ids)
            totals.max_token_id = max(totals.max_token_id, int(ids.max()))
        totals.bytes += sum(_size(text) for text in batch)
    builder.finalize(str(folder / "corpus.idx"))
    if totals.documents == 0:
        raise ConfigError(f"data.source={config.source} holds no text in the field {config.text_field}; give another")


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _counted(texts: Iterable[str], progress: Progress, task: TaskID) -> Iterator[str]:
    """``texts``, which move the bar on a terminal, and give a line now and then elsewhere."""
    done, reported = 0, time.monotonic()
    for text in texts:
        yield text
        done += _size(text)
        progress.update(task, completed=done)
        if progress.disable and time.monotonic() >= reported + _REPORT_SECONDS:
            reported = time.monotonic()
            progress.console.print(f"{progress.tasks[task].description}: {done / 1e6:,.0f} MB", **_PLAIN)


def _size(text: str) -> int:
    return len(text.encode())


def _progress(console: Console) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _versions(config: DataConfig) -> dict[str, str]:
    versions = {name: metadata.version(name) for name in _PACKAGES}
    if config.source == PYTHON_SOURCE:
        versions |= {"python": sys.version.split()[0], "torch": metadata.version("torch")}
    return versions
