"""Samples of one corpus, epoch after epoch, from megatron-core; imported late (it takes a second).

Megatron's GPTDataset shuffles differently when more samples are requested, so each epoch is a separate data set with
its own seed: the order depends only on (seed, epoch, index).
"""

from __future__ import annotations

import errno
import hashlib
import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from longcat.errors import ConfigError
from longcat.json_text import dumps
from train.data.blocks import CheckedBinReader
from train.data.corpus import CorpusInfo, block_hashes, note, note_once
from train.data.index_files import publish_index, read_index
from train.data.megatron import GPTDataset, GPTDatasetConfig, IndexedDataset, IndexedDatasetBuilder, Split
from train.data.sealed import DamagedError

# It warns for each data set without a cache of megatron's own kind; _Epoch has another one.
logging.getLogger(GPTDataset.__module__).setLevel(logging.ERROR)

SplitName = Literal["train", "validation"]
_SPLIT_SEED = 20_250_917
_KEPT_EPOCHS = 2


NO_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)  # never a place for an index


class _NoPadding:
    """The part of a tokenizer that GPTDataset uses: no id is padding, so none is rewritten."""

    vocab_size = None
    eod, pad = -1, -(1 << 62)
    unique_identifiers: ClassVar[dict[str, Any]] = {}


class _Epoch(GPTDataset):
    """One epoch whose indices are shared through files.

    In megatron rank 0 writes the cache and a barrier must follow before the others read. Ranks reach a new epoch at
    different times, or never (inner pipeline stages), so a barrier could hang. Instead the first rank writes a folder
    and renames it into place; the content is the same on every rank, so a loser of the race deletes its own folder.

    Args:
        places: folders of this index, in the order in which they are tried.
    """

    def __init__(self, places: list[Path], *arguments: Any) -> None:
        self.places = places
        super().__init__(*arguments)

    def _build_document_sample_shuffle_indices(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        damage = ""
        for folder in self.places:
            try:
                return read_index(folder)
            except FileNotFoundError:
                continue
            except DamagedError as error:
                damage = f"the sample index {folder} is damaged ({error}) and was built again"
        built = super()._build_document_sample_shuffle_indices()
        if self._publish(built) and damage:
            note(damage, any_rank=True)
        return built

    def _publish(self, arrays: tuple[np.ndarray, ...]) -> bool:
        """Write the index where it can be written; returns whether this rank did."""
        failure: OSError | None = None
        for folder in self.places:
            try:
                written = publish_index(folder, arrays)
            except OSError as error:
                failure = failure or error
                continue
            if failure is not None and written:
                note_once(
                    f"the sample index cannot be written beside the corpus ({failure.strerror}); it is in "
                    f"{folder.parent}, and data.cache_dir names a place for all runs",
                    any_rank=True,
                )
            return written
        assert failure is not None
        if failure.errno in NO_FOLDER:
            raise ConfigError(
                f"cannot write the sample index {self.places[0]} ({failure}); name a folder with data.cache_dir"
            ) from failure
        note_once(
            f"the sample index {self.places[0]} cannot be written ({failure.strerror}): every rank keeps its own in "
            f"memory; name another folder with data.cache_dir",
            any_rank=True,
        )
        return False


def megatron_builder(path: str, dtype: type[np.number[Any]]) -> IndexedDatasetBuilder:
    """The writer of a `.bin`/`.idx` pair; in this file so that only it imports megatron-core."""
    return IndexedDatasetBuilder(path, dtype=dtype)


class CorpusReader:
    """The samples of one split of one corpus, numbered over all epochs.

    Documents are split between training and validation by a fixed permutation, the same for every seed of
    training and every sequence length, so runs can be compared and no document is in both.
    """

    def __init__(
        self,
        prefix: str,
        *,
        sequence_length: int,
        seed: int,
        split: SplitName,
        validation_fraction: float,
        cache_dirs: list[Path],
        info: CorpusInfo | None,
    ) -> None:
        self.prefix, self.split, self._seed, self._cache_dirs = prefix, split, seed, cache_dirs
        self._sequence_length = sequence_length
        self._indexed = IndexedDataset(prefix)
        hashes = block_hashes(prefix, info)
        if hashes is not None:
            self._indexed.bin_reader = CheckedBinReader(self._indexed.bin_reader, Path(f"{prefix}.bin"), hashes)
        self.validation_documents, self._sequences = self._split(validation_fraction)
        self.num_tokens = int(self._indexed.sequence_lengths[self._sequences].sum(dtype=np.int64))
        self.samples_per_epoch = (self.num_tokens - 1) // sequence_length
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        if self.samples_per_epoch < 1:
            raise ConfigError(self._too_small(validation_fraction))
        self._identity = self._describe(validation_fraction)

    def sample(self, number: int) -> np.ndarray:
        """Sample `number` = epoch · samples_per_epoch + position, int64 [sequence_length + 1]."""
        epoch, position = divmod(number, self.samples_per_epoch)
        item = self._epoch(epoch)[position]
        return np.concatenate((item["tokens"].numpy(), item["labels"][-1:].numpy()))

    def document(self, number: int) -> np.ndarray:
        """All token ids of one document, int64 [length]; none if it has no sequence."""
        first, last = self._indexed.document_indices[number : number + 2]
        parts = [self._indexed[sequence] for sequence in range(int(first), int(last))]
        return np.concatenate([np.zeros(0, dtype=np.int64), *(np.asarray(part, dtype=np.int64) for part in parts)])

    def last_tokens(self, limit: int = 256) -> set[int]:
        """The different ids that the first `limit` documents end with."""
        count = min(limit, len(self._indexed.document_indices) - 1)
        documents = (self.document(number) for number in range(count))
        return {int(document[-1]) for document in documents if len(document)}

    def _split(self, fraction: float) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the validation documents, and of the sequences of this reader's split."""
        bounds = np.asarray(self._indexed.document_indices)
        documents = len(bounds) - 1
        if documents < 2:
            raise ConfigError(f"the corpus {self.prefix} has {documents} document; a validation split needs at least 2")
        count = min(max(1, round(fraction * documents)), documents - 1)
        chosen = np.zeros(documents, dtype=bool)
        chosen[np.random.RandomState(_SPLIT_SEED).permutation(documents)[:count]] = True
        wanted = chosen if self.split == "validation" else ~chosen
        return np.flatnonzero(chosen), np.flatnonzero(np.repeat(wanted, np.diff(bounds)))

    def _too_small(self, fraction: float) -> str:
        need = self._sequence_length + 1
        cure = f"raise data.validation_fraction={fraction}, " if self.split == "validation" else ""
        return (
            f"the {self.split} split of the corpus {self.prefix} has {self.num_tokens} tokens, one sample "
            f"needs {need}: "
            f"{cure}lower train.sequence_length={self._sequence_length} or build a larger corpus"
        )

    def _describe(self, fraction: float) -> list[Any]:
        """Everything but the seed that the order of an epoch depends on."""
        status = Path(f"{self.prefix}.idx").stat()
        where = str(Path(self.prefix).resolve())
        file = [where, status.st_size, status.st_mtime_ns]
        return [*file, self.split, fraction, self._sequence_length, _SPLIT_SEED]

    def _epoch(self, epoch: int) -> _Epoch:
        if epoch in self._epochs:
            return self._epochs[epoch]
        seed = (self._seed + epoch) % (1 << 32)
        # Without a blend in its configuration megatron reads the given data set and keeps no cache.
        config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=self._sequence_length,
            tokenizer=_NoPadding(),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        key = hashlib.sha256(dumps([*self._identity, seed]).encode()).hexdigest()[:24]
        places = [folder / f"epoch-{key}" for folder in self._cache_dirs]
        split = Split.train if self.split == "train" else Split.valid
        self._epochs[epoch] = _Epoch(places, self._indexed, self.prefix, self._sequences, None, split, config)
        if len(self._epochs) > _KEPT_EPOCHS:
            self._epochs.popitem(last=False)
        return self._epochs[epoch]
