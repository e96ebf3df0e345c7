"""A checkpoint read without ranks: its configuration, and any box of any stored tensor, one at a time."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from longcat.config import ModelConfig
from longcat.errors import ConfigError
from longcat.model import LongCat
from longcat.names import Box, stored_state
from train.checkpoint.compatibility import TOKENIZER
from train.checkpoint.files import read_text
from train.checkpoint.find import find_valid
from train.checkpoint.manifest import STATE, CheckpointStatus
from train.checkpoint.shards import ShardReader
from train.data.config import tokenizer_file
from train.data.corpus import TOKENIZER_NAME, file_sha256, read_info
from train.data.tokens import end_of_document_id, load_tokenizer
from train.stages.stored import stored_stage


class TensorSource(Protocol):
    """A source of a model's stored tensors, read box by box, so that few are in memory."""

    def boxes(self, stored_name: str, shape: tuple[int, ...]) -> list[Box]:
        """Boxes that cover a stored tensor of this shape, in order, each cheap to read alone."""

    def read(self, stored_name: str, shape: tuple[int, ...], box: Box) -> Tensor:
        """The values in ``box``, float32."""


class Checkpoint:
    """A `TensorSource` of a valid checkpoint's weights and biases; reports newer ones that it skips.

    Its ``model`` and ``sequence_length`` are those of the stage of `data.stages` in which its last sample was.

    Raises:
        ConfigError: the folder is no checkpoint, or its hashes do not match.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, skipped = find_valid(folder)
        report_skipped(skipped, self.folder)
        try:
            stored = json.loads(read_text(self.folder / STATE))
            self.reader = ShardReader(self.folder)
            self.metadata = self.reader.read_metadata()
        except OSError as error:
            raise gone(self.folder, error) from error
        self.configuration: dict[str, Any] = stored["configuration"]
        self.counters: dict[str, int] = stored["counters"]
        self.health: dict[str, Any] | None = stored.get("health")
        try:
            model, self.sequence_length = stored_stage(stored)
            self.model = ModelConfig.from_mapping(model)
            self.model.validate()
        except (TypeError, KeyError, ConfigError) as error:
            raise ConfigError(f"{self.folder} is of another version of this program ({error}); use that one") from error

    def boxes(self, stored_name: str, shape: tuple[int, ...]) -> list[Box]:
        """The full tensor, or stacks of experts as the shards are cut, so that each shard is read once."""
        if not stored_name.rpartition(".")[0].endswith(".experts"):
            return [full_box(shape)]
        chunks = self._stored(key_of(stored_name)).chunks
        cuts = sorted({0, shape[0], *(chunk.offsets[0] for chunk in chunks)})
        return [((start, stop), *full_box(shape[1:])) for start, stop in itertools.pairwise(cuts) if stop > start]

    def read(self, stored_name: str, shape: tuple[int, ...], box: Box) -> Tensor:
        stored = tuple(self._stored(key_of(stored_name)).size)
        if stored != tuple(shape):
            raise ConfigError(
                f"{self.folder}: {stored_name} has shape {list(stored)}, and {list(shape)} by its configuration; "
                f"use another checkpoint"
            )
        return self.read_key(key_of(stored_name), box, torch.float32)

    def read_key(self, key: str, box: Box, dtype: torch.dtype | None = None) -> Tensor:
        """The values of any stored tensor (weight, moment, bias, controller) in ``box``, in its dtype or in ``dtype``.

        Args:
            key: `kind/stored name`, as in the checkpoint's index.

        Raises:
            ConfigError: the tensor or a part of it is missing, or a file can no longer be read.
        """
        from train.checkpoint.dcp_tensors import DcpTensor, read_values

        stored = self._stored(key)
        kind = dtype or stored.properties.dtype
        values = torch.zeros([stop - start for start, stop in box], dtype=kind)
        wanted: dict[str, Any] = {key: DcpTensor(tuple(stored.size), [(box, values)], kind)}
        try:
            read_values(wanted, self.reader, self.metadata)
        except ValueError as error:
            raise ConfigError(f"checkpoint {self.folder} cannot be used: {error}; use another one") from error
        except OSError as error:
            raise gone(self.folder, error) from error
        return values

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """`kind/stored name` → shape of every stored tensor."""
        return {key: tuple(self._stored(key).size) for key in self.metadata.state_dict_metadata}

    def tokenizer(self, given: str, key: str) -> Path:
        """The tokenizer.json that the checkpoint was trained with; ``given`` by the option ``key``, or the corpus's.

        Raises:
            ConfigError: it does not exist, or its hash is not the checkpoint's.
        """
        data = self.configuration["data"]
        corpora = [Path(path).parent / TOKENIZER_NAME for path in data["paths"]]
        named = [tokenizer_file(given)] if given else [data.get("tokenizer"), *corpora]
        candidates = [Path(path) for path in named if path]
        existing = [path for path in candidates if path.is_file()]
        if not existing:
            raise ConfigError(f"no tokenizer at {' or '.join(map(str, candidates))}; name one with {key}=FILE")
        wanted = self.configuration.get(TOKENIZER)
        for path in existing:
            if wanted is None or file_sha256(path) == wanted:
                return path
        raise ConfigError(
            f"{' and '.join(map(str, existing))} is not the tokenizer that the checkpoint was trained with, whose "
            f"SHA-256 is {wanted}; name that one with {key}=FILE"
        )

    def end_of_document(self, tokenizer: Path) -> int:
        """Id of the token that ended the documents in training: by `data.eos_token`, the corpora, or the tokenizer.

        Args:
            tokenizer: the tokenizer.json that `tokenizer` has found.

        Raises:
            ConfigError: nothing names a token that the tokenizer has.
        """
        data = self.configuration["data"]
        if data.get("eos_token") is None:
            sha256 = file_sha256(tokenizer)
            for info in map(read_info, data["paths"]):
                if info is not None and info.tokenizer_sha256 == sha256:
                    return info.eod
        return end_of_document_id(load_tokenizer(tokenizer), str(tokenizer), data.get("eos_token"))

    def _stored(self, key: str) -> Any:
        found = self.metadata.state_dict_metadata.get(key)
        if found is None:
            raise ConfigError(f"{self.folder} has no {key}; use another checkpoint")
        return found


def gone(folder: Path, error: OSError) -> ConfigError:
    """The error for a checkpoint that was valid a moment ago."""
    return ConfigError(
        f"{folder} can no longer be read ({error}); does a running training remove its old checkpoints? Use a newer one"
    )


def key_of(stored_name: str) -> str:
    """The key of a weight or a router's bias in a checkpoint."""
    return f"{'bias' if stored_name.endswith('e_score_correction_bias') else 'weight'}/{stored_name}"


def full_box(shape: tuple[int, ...]) -> Box:
    return tuple((0, size) for size in shape)


def report_skipped(skipped: list[CheckpointStatus], used: Path) -> None:
    """Print skipped checkpoints to standard error; standard output has the verb's result."""
    for status in skipped:
        print(f"skipped {status.folder}: {status.problem}", file=sys.stderr)
    if skipped:
        print(f"used instead: {used}", file=sys.stderr)


def stored_shapes(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(stored name, shape) of every tensor of a model; nothing is allocated."""
    with torch.device("meta"):
        model = LongCat(config)
    for name, tensor in stored_state(model):
        yield name, tuple(tensor.shape)


@torch.no_grad()
def load_model(config: ModelConfig, source: TensorSource, dtype: torch.dtype, device: torch.device) -> LongCat:
    """A model for inference with a source's values in ``dtype``; routers and biases stay float32."""
    with torch.device("meta"):
        model = LongCat(config).to(dtype)
        for router in model.routers():
            router.float()
    model.to_empty(device=device)
    for name, tensor in stored_state(model):
        for box in source.boxes(name, tuple(tensor.shape)):
            values = source.read(name, tuple(tensor.shape), box)
            tensor[tuple(slice(start, stop) for start, stop in box)].copy_(values)
    return model.requires_grad_(False).eval()
