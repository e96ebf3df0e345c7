"""`longcat export`: a checkpoint as a Hugging Face folder, in constant memory."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path

import torch

from longcat.config_choices import check_choice
from longcat.errors import ConfigError
from longcat.json_text import dumps
from train.checkpoint.files import atomic_folder, file_hash, write_synced
from train.checkpoint.manifest import check_target
from train.checkpoint.offline_reader import Checkpoint
from train.data.corpus import TOKENIZER_NAME
from train.data.tokens import added_tokens, load_tokenizer
from train.huggingface.config_json import check_expressible, texts
from train.huggingface.layouts import Layout, export_dtype, layout_tensors, tensor_sizes
from train.huggingface.record import RECORD, ExportRecord
from train.huggingface.safetensors_folder import ShardWriter
from train.huggingface.serving import serving_notes

GIB = 2**30


class ExportDtype(StrEnum):
    """Type of all exported tensors except the routers'."""

    bfloat16 = "bfloat16"
    float32 = "float32"


@dataclass
class ExportFormat:
    """The form of an exported folder."""

    # released = what serving engines and transformers 4.57 read; transformers = what transformers 5.23 reads
    layout: Layout = Layout.released
    # bfloat16, or float32 (the fp32 master weights). Routers and their biases are float32 always
    dtype: ExportDtype = ExportDtype.bfloat16
    shard_gib: float = 5.0  # largest file in GiB, unless one tensor is larger
    tokenizer: str = ""  # the tokenizer.json the model was trained with; empty = that of the corpus

    def validate(self) -> None:
        check_choice("export.layout", self.layout, Layout)
        check_choice("export.dtype", self.dtype, ExportDtype)
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


def export(options: ExportOptions) -> tuple[Path, list[str]]:
    """Write the folder ``options.target``, which gets this name when it is complete.

    Returns the folder, and a line for each program that cannot serve a model of these sizes, or that would read text
    otherwise than training did.

    Raises:
        ConfigError: a wrong option, a source that is no valid checkpoint, a target that exists.
    """
    options.validate()
    target, form = Path(options.target), options.export
    check_target(target)
    checkpoint = Checkpoint(Path(options.source))
    check_expressible(checkpoint.model)
    tokenizer = checkpoint.tokenizer(form.tokenizer, "export.tokenizer")
    end = checkpoint.end_of_document(tokenizer)
    dtype = getattr(torch, form.dtype)
    with atomic_folder(target) as partial:
        writer = ShardWriter(partial, tensor_sizes(checkpoint.model, form.layout, dtype), form.shard_gib * GIB)
        for name, values in layout_tensors(checkpoint.model, form.layout, checkpoint):
            writer.put(name, values.to(export_dtype(name, dtype), copy=True).contiguous())
        writer.close()
        positions = checkpoint.sequence_length
        files = texts(checkpoint.model, form.layout, form.dtype, end, positions)
        files["tokenizer_config.json"] = tokenizer_settings(tokenizer, end, positions)
        shutil.copyfile(tokenizer, partial / TOKENIZER_NAME)  # unchanged: a checkpoint knows it by its hash
        record = ExportRecord(
            model=asdict(checkpoint.model),
            layout=str(form.layout),
            counters=checkpoint.counters,
            sequence_length=positions,
            tokenizer=file_hash(partial / TOKENIZER_NAME),
            tensors=writer.records,
        )
        for file, text in {**files, RECORD: record.text()}.items():
            write_synced(partial / file, text)
    notes = serving_notes(checkpoint.model, positions)
    if added := added_tokens(load_tokenizer(tokenizer)):
        notes.append(
            f"{TOKENIZER_NAME} adds {' '.join(added)} to a text, which training left out: let clients encode without "
            f"special tokens (add_special_tokens=False)"
        )
    return target, notes


def tokenizer_settings(path: Path, end: int, positions: int) -> str:
    """tokenizer_config.json, which AutoTokenizer needs; no token is put before a text."""
    name = load_tokenizer(path).id_to_token(end)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{kind: name for kind in ("bos_token", "eos_token", "pad_token")},
        "model_max_length": positions,
        "clean_up_tokenization_spaces": False,
    }
    return dumps(settings, indent=2, ensure_ascii=False) + "\n"
