"""Samples of one corpus, epoch after epoch, in the order that megatron-core gives them.

Megatron's GPTDataset shuffles differently when more samples are requested, so each epoch is a separate data set with
its own seed: the order depends only on (seed, epoch, index). Megatron builds the index of an epoch
(`train/data/megatron_index.py`); once it is on disk, samples are read without that package, which takes a second.
"""

from __future__ import annotations

import errno
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np

from longcat.errors import ConfigError
from longcat.json_text import dumps
from train.data.blocks import BinReader
from train.data.corpus import CorpusInfo, block_hashes, note, note_once
from train.data.corpus import read_index as read_corpus_index
from train.data.index_files import NAMES, first_to_build, publish_index, read_index
from train.run_dir.sealed import DamagedError

SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "validation")
SPLIT_SEED = 20_250_917
_KEPT_EPOCHS = 2


NO_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)  # never a place for an index

# Of the samples that Megatron cuts: sequences, (sequence's place, offset) of samples, their order
EpochIndex = tuple[np.ndarray, ...]


def publish(places: list[Path], arrays: tuple[np.ndarray, ...], names: Sequence[str] = NAMES) -> bool:
    """Write an index where it can be written; returns whether this rank did.

    In megatron rank 0 writes the cache and a barrier must follow before the others read. Ranks reach a new epoch at
    different times, or never (inner pipeline stages), so a barrier could hang. Instead the first rank writes a folder
    and renames it into place; the content is the same on every rank, so a loser of the race deletes its own folder.
    """
    failure: OSError | None = None
    for folder in places:
        try:
            written = publish_index(folder, arrays, names)
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
            f"cannot write the sample index {places[0]} ({failure}); name a folder with data.cache_dir"
        ) from failure
    note_once(
        f"the sample index {places[0]} cannot be written ({failure.strerror}): every rank keeps its own in "
        f"memory; name another folder with data.cache_dir",
        any_rank=True,
    )
    return False


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
        writes: bool = True,
    ) -> None:
        self.prefix, self.split, self._seed, self._cache_dirs = prefix, split, seed, cache_dirs
        self._writes = writes
        self._index = read_corpus_index(Path(f"{prefix}.idx"))
        self._tokens = BinReader(Path(f"{prefix}.bin"), self._index.dtype, block_hashes(prefix, info))
        self._fraction = validation_fraction
        self.validation_documents, tokens = self._read_or_build(
            "split", [*self._file(), validation_fraction, SPLIT_SEED], ("validation", "tokens"), self._build_split
        )
        self.num_tokens = int(tokens[SPLITS.index(split)])
        self._set_length(sequence_length)

    def of_length(self, sequence_length: int) -> CorpusReader:
        """A reader of the same split in samples of another length, in an order of their own."""
        other = copy(self)
        other._set_length(sequence_length)
        return other

    def check_has_samples(self, key: str = "train.sequence_length") -> None:
        """Raise ConfigError if the split is shorter than one sample, whose length ``key`` sets."""
        if self.samples_per_epoch < 1:
            raise ConfigError(self._too_small(self._fraction, key))

    def _set_length(self, sequence_length: int) -> None:
        self._sequence_length = sequence_length
        self._epochs: OrderedDict[int, EpochIndex] = OrderedDict()
        self._identity = self._describe(self._fraction)
        self.samples_per_epoch = self._count_samples()
        self.epoch_size = self._epoch_size()  # what an epoch's share is in mixtures without weights

    def _count_samples(self) -> int:
        return max(self.num_tokens - 1, 0) // self._sequence_length

    def _epoch_size(self) -> float:
        return float(self.num_tokens)

    def open_index(self, number: int) -> None:
        """Read the index of sample `number`'s epoch, or make it, which takes long for a large corpus."""
        self._epoch(number // self.samples_per_epoch)

    def sample(self, number: int) -> np.ndarray:
        """Sample `number` = epoch · samples_per_epoch + position, int64 [sequence_length + 1]."""
        return self._ids(self._pieces(number))

    def sample_with_documents(self, number: int) -> np.ndarray:
        """The same token ids, and the number within the sample of each one's document, int64 [2, sequence_length + 1].

        Numbers start at 0. Documents are those of the index, whatever ids they end with. Megatron shuffles sequences,
        so another document begins with each, unless it follows the sequence before it in the same document.
        """
        pieces = self._pieces(number)
        documents = np.searchsorted(self._index.bounds, [sequence for sequence, _, _ in pieces], side="right")
        numbers, current = [], -1
        for at, (sequence, _, _) in enumerate(pieces):
            if not at or sequence != pieces[at - 1][0] + 1 or documents[at] != documents[at - 1]:
                current += 1
            numbers.append(current)
        of_tokens = np.repeat(numbers, [stop - start for _, start, stop in pieces])
        return np.stack([self._ids(pieces), of_tokens.astype(np.int64)])

    def _pieces(self, number: int) -> list[tuple[int, int, int]]:
        """(sequence, its first token, the token after its last one) of each sequence in a sample; none is empty."""
        epoch, position = divmod(number, self.samples_per_epoch)
        sequences, starts, shuffle = self._epoch(epoch)
        place = int(shuffle[position])
        (first, begin), (last, end) = starts[place].tolist(), starts[place + 1].tolist()
        pieces = []
        for at in range(first, last + 1):
            sequence = int(sequences[at])
            start = begin if at == first else 0
            stop = end + 1 if at == last else int(self._index.lengths[sequence])  # one more: the last label
            if stop > start:
                pieces.append((sequence, start, stop))
        return pieces

    def _ids(self, pieces: list[tuple[int, int, int]]) -> np.ndarray:
        return np.concatenate([self._read(*piece) for piece in pieces])

    def document(self, number: int) -> np.ndarray:
        """All token ids of one document, int64 [length]; none if it has no sequence."""
        first, last = self._index.bounds[number : number + 2].tolist()
        parts = [self._read(sequence, 0, int(self._index.lengths[sequence])) for sequence in range(first, last)]
        return np.concatenate([np.zeros(0, dtype=np.int64), *parts])

    def _read(self, sequence: int, start: int, stop: int) -> np.ndarray:
        """Token ids ``start`` … ``stop`` of a sequence, int64."""
        offset = int(self._index.pointers[sequence]) + start * self._index.dtype.itemsize
        return self._tokens.read(stop - start, offset).astype(np.int64)

    def _build_split(self) -> tuple[np.ndarray, ...]:
        """Numbers of the validation documents, ascending, and the tokens of each of `SPLITS`."""
        documents = len(self._index.bounds) - 1
        if documents < 2:
            raise ConfigError(f"the corpus {self.prefix} has {documents} document; a validation split needs at least 2")
        count = min(max(1, round(self._fraction * documents)), documents - 1)
        chosen = np.sort(np.random.RandomState(SPLIT_SEED).permutation(documents)[:count])
        in_validation = np.zeros(documents, dtype=bool)
        in_validation[chosen] = True
        validation = int(self._index.lengths[self._in_sequences(in_validation)].sum(dtype=np.int64))
        return chosen, np.array([self._index.num_tokens - validation, validation])

    def _in_sequences(self, of_documents: np.ndarray) -> np.ndarray:
        """A mask of documents as one of their sequences."""
        return np.repeat(of_documents, np.diff(self._index.bounds))

    def documents(self) -> np.ndarray:
        """Whether each document is in this split, bool [documents]."""
        in_validation = np.zeros(len(self._index.bounds) - 1, dtype=bool)
        in_validation[self.validation_documents] = True
        return in_validation if self.split == "validation" else ~in_validation

    def _sequences(self) -> np.ndarray:
        """Numbers of this split's sequences, ascending. Not kept: only who builds an index needs them."""
        return np.flatnonzero(self._in_sequences(self.documents()))

    def _too_small(self, fraction: float, key: str) -> str:
        need = self._sequence_length + 1
        cure = f"raise data.validation_fraction={fraction}, " if self.split == "validation" else ""
        return (
            f"the {self.split} split of the corpus {self.prefix} has {self.num_tokens} tokens, one sample "
            f"needs {need}: "
            f"{cure}lower {key}={self._sequence_length} or build a larger corpus"
        )

    def _describe(self, fraction: float) -> list[Any]:
        """Everything but the seed that the order of an epoch depends on."""
        return [*self._file(), self.split, fraction, self._sequence_length, SPLIT_SEED]

    def _file(self) -> list[Any]:
        """What another corpus would have otherwise."""
        status = Path(f"{self.prefix}.idx").stat()
        return [str(Path(self.prefix).resolve()), status.st_size, status.st_mtime_ns]

    def _epoch(self, epoch: int) -> EpochIndex:
        if epoch not in self._epochs:
            self._epochs[epoch] = self._index_of((self._seed + epoch) % (1 << 32))
            if len(self._epochs) > _KEPT_EPOCHS:
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _index_of(self, seed: int) -> EpochIndex:
        def build() -> EpochIndex:
            from train.data.megatron_index import build_index

            return build_index(self.prefix, self._sequences(), self._sequence_length, seed, self.split == "train")

        return self._read_or_build("epoch", [*self._identity, seed], NAMES, build)

    def _read_or_build(
        self, kind: str, identity: list[Any], names: Sequence[str], build: Callable[[], tuple[np.ndarray, ...]]
    ) -> tuple[np.ndarray, ...]:
        """An index from the first of its folders that has it, else built, and written if the reader writes."""
        key = hashlib.sha256(dumps(identity).encode()).hexdigest()[:24]
        places = [folder / f"{kind}-{key}" for folder in self._cache_dirs]
        found, _ = _first_valid(places, names)
        if found is not None:
            return found
        if not self._writes:
            return build()
        with first_to_build(places, note_once) as is_first:
            if is_first:
                return _build(places, names, build)
        return _build(places, names, build)  # reads what the first has written; where it could not, all build at once


def _build(places: list[Path], names: Sequence[str], build: Callable[[], tuple[np.ndarray, ...]]) -> EpochIndex:
    """Build an index and write it, unless another process has in the meantime."""
    found, damage = _first_valid(places, names)
    if found is not None:
        return found
    built = build()
    if publish(places, built, names) and damage:
        note(damage, any_rank=True)
    found, _ = _first_valid(places, names)  # mapped, so that the ranks of a machine share its memory
    return built if found is None else found


def _first_valid(places: list[Path], names: Sequence[str]) -> tuple[EpochIndex | None, str]:
    """The index of the first folder that has it, and what is wrong with one that is damaged."""
    damage = ""
    for folder in places:
        try:
            return read_index(folder, names), damage
        except FileNotFoundError:
            continue
        except DamagedError as error:
            damage = f"the sample index {folder} is damaged ({error}) and was built again"
    return None, damage
