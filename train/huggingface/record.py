"""longcat.json, the record of an export: the whole model, counters, and hashes by which an import finds damage."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from longcat.json_text import dumps
from longcat.rope import RopeScaling
from train.checkpoint.files import HASH, file_hash, new_hash
from train.data.corpus import TOKENIZER_NAME
from train.huggingface.fields import NAMES
from train.huggingface.values import read_json

RECORD = "longcat.json"
LABELS = NAMES | {"positions": "max_position_embeddings"}  # of config.json
REMEDY = f"restore {RECORD}, or remove it to import the folder as one of another program's"


@dataclass
class TensorRecord:
    """What an export wrote of one tensor."""

    dtype: str  # as safetensors names it
    hash: str


@dataclass
class ExportRecord:
    """The contents of longcat.json, without the hash of itself. Exports of before 28 November 2026 have no hashes."""

    model: dict[str, Any]  # of ModelConfig
    layout: str
    counters: dict[str, int]
    sequence_length: int | None = None
    tokenizer: str | None = None  # hash of tokenizer.json
    tensors: dict[str, TensorRecord] = field(default_factory=dict)

    def text(self) -> str:
        """The file's text. One line per tensor keeps it readable."""
        tree = asdict(self)
        tree["tensors"] = {name: [one.dtype, one.hash] for name, one in self.tensors.items()}
        lines = ",\n".join(f"    {dumps(name)}: {dumps(one)}" for name, one in tree.pop("tensors").items())
        head = dumps({**tree, HASH: digest(asdict(self))}, indent=2).removesuffix("\n}")
        return f'{head},\n  "tensors": {{\n{lines}\n  }}\n}}\n'


def digest(tree: dict[str, Any]) -> str:
    """Hash of a tree of plain values, whatever the order of its names."""
    made = new_hash()
    made.update(dumps(tree, sort_keys=True).encode())
    return str(made.hexdigest())


def tensor_hash(values: Tensor) -> str:
    """Hash of a tensor's bytes in memory."""
    made = new_hash()
    made.update(values.contiguous().flatten().view(torch.uint8).numpy().data)
    return str(made.hexdigest())


def read_record(folder: Path) -> ExportRecord | None:
    """The record of an export; None where there is none, as in folders of other programs.

    Raises:
        ConfigError: it is damaged, or of another version of this program.
    """
    path = folder / RECORD
    if not os.path.lexists(path):
        return None
    tree = read_json(path, REMEDY)
    stored = tree.pop(HASH, None)
    try:
        tree["tensors"] = {name: TensorRecord(*one) for name, one in tree.get("tensors", {}).items()}
        record = ExportRecord(**tree)
        RopeScaling(**record.model.get("rope_scaling", {}))
        unknown = sorted(record.model.keys() - {one.name for one in fields(ModelConfig)})
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged or of another version of this program ({error}); {REMEDY}") from error
    if unknown:
        raise ConfigError(f"{path} has the unknown size {unknown[0]}, perhaps of a newer version; {REMEDY}")
    if (stored is None and record.tensors) or (stored is not None and stored != digest(asdict(record))):
        raise ConfigError(f"{path} has changed since the export: its own hash does not fit; {REMEDY}")
    return record


def merge(path: Path, found: dict[str, Any], record: ExportRecord, overridden: Collection[str]) -> dict[str, Any]:
    """``found`` in config.json at ``path`` and the weights, completed by what only the record has.

    ``overridden`` are the keys of the configuration that the user has set.

    Raises:
        ConfigError: both have a size, with different values, and the user has not set it.
    """
    ours = record.model | {"rope_scaling": RopeScaling(**record.model.get("rope_scaling", {}))}
    if record.sequence_length is not None:
        ours["positions"] = record.sequence_length
    for name in found.keys() & ours.keys() - {"name", "expected_ffn_experts"}:
        value, exported = found[name], ours[name]
        same = value == exported or (name == "rope_scaling" and value.factor == exported.factor == 1)
        key = "train.sequence_length" if name == "positions" else f"model.{name}"
        if not same and not any(one.startswith(key) for one in overridden):
            raise ConfigError(
                f"{path} and {RECORD} beside it contradict each other: {LABELS.get(name, name)} is {value} and was "
                f"{exported} when it was exported; undo the change, or say which with {key}"
            )
    return found | ours


def check_tokenizer(folder: Path, record: ExportRecord | None) -> None:
    """Raise ConfigError if the tokenizer of an export is not the one that was exported."""
    path = folder / TOKENIZER_NAME
    if record is None or record.tokenizer is None or not path.is_file():
        return
    if file_hash(path) != record.tokenizer:
        raise ConfigError(
            f"{path} has changed since the export: its hash is not that of {RECORD}; restore it, or name another "
            f"(import: data.tokenizer=FILE, generate: tokenizer=FILE)"
        )
