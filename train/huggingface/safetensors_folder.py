"""Folders of safetensors: written in files of a chosen size with an index, read tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from longcat.json_text import dumps
from longcat.names import Box, pieces
from train.checkpoint.files import write_synced
from train.checkpoint.manifest import MANIFEST
from train.checkpoint.offline_reader import full_box
from train.huggingface.layouts import (
    PREDICTION,
    PREDICTION_EMBEDDING,
    Layout,
    MetaSource,
    identity_names,
    layout_tensors,
)
from train.huggingface.quantized import (
    FP8,
    SCALE,
    WEIGHT,
    check_quantized,
    dequantize,
    read_block,
    scale_name,
    scale_shape,
)
from train.huggingface.record import RECORD, TensorRecord, read_record, tensor_hash
from train.huggingface.values import read_json

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, FP8: torch.float8_e4m3fn}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
ROTARY = ".rotary_emb.inv_freq"  # ends the name of a buffer that some programs save; it follows from config.json


class ShardWriter:
    """Writes tensors that arrive in the order of ``sizes`` (name, bytes); at most one file is in memory."""

    def __init__(self, folder: Path, sizes: list[tuple[str, int]], shard_bytes: float) -> None:
        self.folder = folder
        self.total = sum(size for _, size in sizes)
        self.shards: list[list[str]] = [[]]
        filled = 0
        for name, size in sizes:
            if self.shards[-1] and filled + size > shard_bytes:
                self.shards.append([])
                filled = 0
            self.shards[-1].append(name)
            filled += size
        self.pending: dict[str, Tensor] = {}
        self.records: dict[str, TensorRecord] = {}
        self.written = 0

    def file_name(self, number: int) -> str:
        return f"model-{number + 1:05}-of-{len(self.shards):05}.safetensors"

    def put(self, name: str, values: Tensor) -> None:
        """Take the next tensor; writes a file when it is complete."""
        from safetensors.torch import save_file

        expected = self.shards[self.written]
        assert name == expected[len(self.pending)], f"{name} came where {expected[len(self.pending)]} was due"
        self.pending[name] = values
        self.records[name] = TensorRecord(DTYPE_NAMES[values.dtype], tensor_hash(values))
        if len(self.pending) == len(expected):
            path = self.folder / self.file_name(self.written)
            save_file(self.pending, path, metadata={"format": "pt"})
            path.chmod(self.folder.stat().st_mode & 0o666)  # safetensors makes its files unreadable for other users
            self.pending = {}
            self.written += 1

    def close(self) -> None:
        """Write the index."""
        assert self.written == len(self.shards), "some tensors were never given"
        files = {name: self.file_name(number) for number, shard in enumerate(self.shards) for name in shard}
        index = {"metadata": {"total_size": self.total}, "weight_map": dict(sorted(files.items()))}
        write_synced(self.folder / INDEX, dumps(index, indent=2) + "\n")


def no_weights(folder: Path) -> str:
    """Why ``folder`` cannot be imported, and what to do instead."""
    if not folder.exists():
        return (
            f"source={folder} does not exist; name a folder on this machine: models of the hub are downloaded first, "
            f"for instance with hf download OWNER/NAME --local-dir DIR"
        )
    if not folder.is_dir():
        return f"source={folder} is no folder; name the folder that holds {INDEX} or {SINGLE}"
    if (folder / MANIFEST).is_file() or (folder / "checkpoints").is_dir():
        return (
            f"source={folder} is a checkpoint or a run of this program, which needs no import; train on from it with "
            f"checkpoint.resume={folder}"
        )
    return f"source={folder} has neither {INDEX} nor {SINGLE}; give a folder of safetensors"


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what `git clone` writes in place of a large one where Git LFS is not installed."""
    try:
        with path.open("rb") as file:
            return file.read(len(LFS_POINTER)) == LFS_POINTER
    except OSError:
        return False


class SafetensorsFolder:
    """A `TensorSource` of a Hugging Face folder; each expert is a box.

    Quantised weights are multiplied by their scales as they are read. What an export of this program has is compared
    with its hash when it is read, unless the folder's owner has converted it to another type.

    Raises:
        ConfigError: there is no index and no model.safetensors, or a file is missing, damaged or of an unknown kind.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.opened: dict[str, Any] = {}
        self.files_by_tensor = self._read_index()
        self.block = read_block(folder)
        self.record = read_record(folder)

    def _read_index(self) -> dict[str, str]:
        """Name of each tensor → its file."""
        if (self.folder / INDEX).is_file():
            places = read_json(self.folder / INDEX, "restore it").get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
                raise ConfigError(f"{self.folder / INDEX} has no weight_map from tensors to files; restore it")
            return places
        if (self.folder / SINGLE).is_file():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        raise ConfigError(no_weights(self.folder))

    def _open(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self.opened:
            if (self.folder / file).exists() and not (self.folder / file).is_file():
                raise ConfigError(f"{self.folder / file} is no regular file; restore it")
            try:
                self.opened[file] = safe_open(self.folder / file, framework="pt")
            except (OSError, SafetensorError) as error:
                if is_lfs_pointer(self.folder / file):
                    raise ConfigError(
                        f"{self.folder / file} is a pointer of Git LFS and holds no weights; get them with git lfs pull"
                    ) from error
                raise ConfigError(f"{self.folder / file} is missing or damaged ({error}); restore it") from error
        return self.opened[file]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; raises ConfigError where its dtype is unknown."""
        self.dtype(name)
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """The type of a tensor as safetensors names it; raises ConfigError where it is unknown."""
        found = str(self._slice(name).get_dtype())
        if found not in DTYPES:
            raise ConfigError(
                f"{self.folder}: {name} is {found}; only {', '.join(DTYPES)} can be read: convert it first"
            )
        return found

    def _slice(self, name: str) -> Any:
        from safetensors import SafetensorError

        try:
            return self._open(self.files_by_tensor[name]).get_slice(name)
        except SafetensorError as error:
            raise ConfigError(
                f"{self.folder / self.files_by_tensor[name]} has no {name} ({error}); restore it"
            ) from error

    def check(self, config: ModelConfig) -> None:
        """Compare names and shapes with those of a model; no tensor is read.

        Raises:
            ConfigError: what is missing, left over or of another shape.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in layout_tensors(config, Layout.released, MetaSource())}
        present = self.files_by_tensor.keys()
        scales = {name for name in present if name.endswith(SCALE) and f"{name.removesuffix(SCALE)}{WEIGHT}" in present}
        found = {name for name in present - scales if not name.endswith(ROTARY)} - {PREDICTION_EMBEDDING}
        shapes.pop(PREDICTION_EMBEDDING, None)  # our own copy of the embedding may be left out
        if not config.num_mtp_layers:
            found = {name for name in found if not name.startswith(PREDICTION)}
        for layer in range(config.num_layers):
            found = found - set(identity_names(f"model.layers.{layer}.mlp.experts", config))
        for verb, names in (("lacks", shapes.keys() - found), ("has unknown", found - shapes.keys())):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise ConfigError(
                    f"source={self.folder} {verb} {min(names)}{more}; is config.json, or a model.* given here, of "
                    f"another model?"
                )
        for name, shape in shapes.items():
            if self.shape(name) != shape:
                raise ConfigError(
                    f"source={self.folder}: {name} is {list(self.shape(name))} where config.json, or a model.* given "
                    f"here, asks for {list(shape)}"
                )
        self._check_scales(shapes)
        self._check_embedding(config)

    def _check_scales(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Raise ConfigError unless exactly the quantised weights have scales, of the right shape."""
        dtypes = {name: self.dtype(name) for name in shapes}
        of_scales = {name: self.dtype(name) for name in self.files_by_tensor if name.endswith(SCALE)}
        check_quantized(self.folder, shapes, dtypes | of_scales, self.block)
        for name, shape in shapes.items():
            if self.block is None or dtypes[name] != FP8:
                continue
            scales = scale_name(name)
            if len(shape) != 2 or self.shape(scales) != scale_shape(shape, self.block):
                raise ConfigError(
                    f"{self.folder}: {scales} is {list(self.shape(scales))}, which does not fit {list(shape)} weights "
                    f"in blocks of {list(self.block)}; restore the files"
                )

    def _check_embedding(self, config: ModelConfig) -> None:
        """MTP shares the model's embedding: raise ConfigError if the files have another one."""
        if not config.num_mtp_layers or PREDICTION_EMBEDDING not in self.files_by_tensor:
            return
        ours, copy = self._slice("model.embed_tokens.weight"), self._slice(PREDICTION_EMBEDDING)
        same = self.shape("model.embed_tokens.weight") == self.shape(PREDICTION_EMBEDDING) and all(
            torch.equal(ours[start : start + 4096].float(), copy[start : start + 4096].float())
            for start in range(0, config.vocab_size, 4096)
        )
        if not same:
            raise ConfigError(
                f"source={self.folder}: MTP has an embedding of its own ({PREDICTION_EMBEDDING}), where this model "
                f"shares one; leave MTP out with model.num_mtp_layers=0"
            )

    def boxes(self, stored_name: str, shape: tuple[int, ...]) -> list[Box]:
        """The full tensor, or one box per expert."""
        if not stored_name.rpartition(".")[0].endswith(".experts"):
            return [full_box(shape)]
        return [((expert, expert + 1), *full_box(shape[1:])) for expert in range(shape[0])]

    def read(self, stored_name: str, shape: tuple[int, ...], box: Box) -> Tensor:
        values = torch.empty([stop - start for start, stop in box])
        for piece in pieces(stored_name, shape, box):
            values[piece.index] = self._read(piece.name, piece.shape, piece.box)
        return values

    def _read(self, name: str, shape: tuple[int, ...], box: Box) -> Tensor:
        """The part ``box`` of a tensor, dequantised. A tensor that is read whole is compared with its recorded hash.

        Raises:
            ConfigError: it has changed since the export, or has values that are not finite.
        """
        values: Tensor = self._slice(name)[tuple(slice(start, stop) for start, stop in box)]
        recorded = self.record.tensors.get(name) if self.record and box == full_box(shape) else None
        if recorded and recorded.dtype == DTYPE_NAMES[values.dtype] and recorded.hash != tensor_hash(values):
            raise ConfigError(
                f"{self.folder / self.files_by_tensor[name]}: {name} has changed since the export: its hash is not in "
                f"{RECORD}; restore the file, or remove {RECORD} to import the folder as one of another program's"
            )
        if self.block is not None and values.dtype == torch.float8_e4m3fn:
            values = dequantize(values, self._slice(scale_name(name))[:], box, self.block)
        if not bool(torch.isfinite(values).all()):
            raise ConfigError(
                f"{self.folder / self.files_by_tensor[name]}: {name} has values that are not finite; restore the file"
            )
        return values
