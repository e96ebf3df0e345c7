"""A checkpoint → a Hugging Face folder, in a stream."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from longcat.errors import ConfigError
from train.checkpoint.compatibility import TOKENIZER
from train.checkpoint.read import Checkpoint
from train.checkpoint.save import sync_folder, write_synced
from train.data.corpus import TOKENIZER_NAME, file_sha256
from train.data.tokens import end_of_document_id, load_tokenizer
from train.huggingface.config_json import check_expressible, texts
from train.huggingface.layouts import LAYOUTS, kept_dtype, layout_tensors, outline
from train.huggingface.safetensors_folder import ShardWriter

GIB = 2**30


@dataclass
class ExportFormat:
    """The form of an exported folder."""

    # released = what serving engines and transformers 4.57 read; transformers = what transformers 5.23 reads
    layout: str = LAYOUTS[0]
    # bfloat16, or float32 (the fp32 master weights). Routers and their biases are float32 always
    dtype: str = "bfloat16"
    shard_gib: float = 5.0  # largest file in GiB, unless one tensor is larger
    tokenizer: str = ""  # the tokenizer.json the model was trained with; empty = that of the corpus

    def validate(self) -> None:
        if self.layout not in LAYOUTS:
            raise ConfigError(f"export.layout={self.layout} is not known; use {' or '.join(LAYOUTS)}")
        if self.dtype not in ("bfloat16", "float32"):
            raise ConfigError(f"export.dtype={self.dtype} is not known; use bfloat16 or float32")
        if not self.shard_gib > 0:
            raise ConfigError(f"export.shard_gib={self.shard_gib} must be above 0")


@dataclass
class ExportOptions:
    """The options of `longcat export`."""

    source: str = ""  # a checkpoint's folder, or a run's for its newest valid one
    target: str = ""  # a folder that does not exist yet
    export: ExportFormat = field(default_factory=ExportFormat)

    def validate(self) -> None:
        if not self.source or not self.target:
            raise ConfigError("say longcat export source=CHECKPOINT target=DIR")
        self.export.validate()


def export(options: ExportOptions) -> Path:
    """Write the folder ``options.target`` and return it; it has this name when all of it is there.

    Raises:
        ConfigError: a wrong option, a source that is no whole checkpoint, a target that exists.
    """
    options.validate()
    target, form = Path(options.target), options.export
    check_absent(target)
    checkpoint = Checkpoint(Path(options.source))
    check_expressible(checkpoint.model)
    tokenizer = tokenizer_of(checkpoint.configuration, form.tokenizer, "export.tokenizer")
    end = end_of_document_id(load_tokenizer(tokenizer), str(tokenizer))
    dtype = getattr(torch, form.dtype)
    with appearing(target) as partial:
        writer = ShardWriter(partial, outline(checkpoint.model, form.layout, dtype), form.shard_gib * GIB)
        for name, values in layout_tensors(checkpoint.model, form.layout, checkpoint):
            writer.put(name, values.to(kept_dtype(name, dtype), copy=True).contiguous())
        writer.close()
        positions = int(checkpoint.configuration["train"]["sequence_length"])
        files = texts(checkpoint.model, form.layout, form.dtype, end, positions, checkpoint.counters)
        files["tokenizer_config.json"] = tokenizer_settings(tokenizer, end, positions)
        for file, text in files.items():
            write_synced(partial / file, text)
        shutil.copyfile(tokenizer, partial / TOKENIZER_NAME)  # the same bytes, by whose hash a checkpoint knows it
    return target


def tokenizer_of(configuration: dict[str, Any], given: str, key: str) -> Path:
    """The tokenizer.json that a checkpoint was trained with, or the one that is given by the option ``key``.

    Raises:
        ConfigError: it is not there, or its hash is not the one that the checkpoint knows.
    """
    data = configuration["data"]
    places = (
        [given] if given else [data.get("tokenizer"), *(Path(path).parent / TOKENIZER_NAME for path in data["paths"])]
    )
    there = [Path(place) for place in places if place and Path(place).is_file()]
    if not there:
        raise ConfigError(f"no tokenizer at {' or '.join(str(p) for p in places if p)}; name one with {key}=FILE")
    wanted = configuration.get(TOKENIZER)
    for place in there:
        if wanted is None or file_sha256(place) == wanted:
            return place
    raise ConfigError(
        f"{' and '.join(map(str, there))} is not the tokenizer that the checkpoint was trained with, whose SHA-256 is "
        f"{wanted}; name that one with {key}=FILE"
    )


def tokenizer_settings(path: Path, end: int, positions: int) -> str:
    """What AutoTokenizer wants beside tokenizer.json. Nothing is put before a text."""
    name = load_tokenizer(path).id_to_token(end)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{kind: name for kind in ("bos_token", "eos_token", "pad_token")},
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(settings, indent=2, ensure_ascii=False) + "\n"


def check_absent(target: Path) -> None:
    if target.exists():
        raise ConfigError(f"target={target} exists and is not overwritten; choose another")


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """A folder to write in that becomes ``target`` when the block ends well, and goes when it does not.

    Raises:
        ConfigError: the target exists, is being written, or cannot be; or the block failed to read or write a file.
    """
    from safetensors import SafetensorError

    check_absent(target)
    partial = target.with_name(f"{target.name}.partial")
    try:
        partial.mkdir(parents=True)
    except FileExistsError as error:
        raise ConfigError(
            f"{partial} is left of a conversion that did not end, or is being written; remove it"
        ) from error
    except OSError as error:
        raise ConfigError(f"target={target} cannot be written ({error.strerror}); choose another") from error
    try:
        yield partial
        if partial.exists():
            partial.rename(target)
            sync_folder(target.parent)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise ConfigError(
                f"target={target} could not be made ({error}); nothing is left of it; is the disk full, or was the "
                f"source removed meanwhile?"
            ) from error
        raise
