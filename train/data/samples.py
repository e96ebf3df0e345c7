"""Training and validation samples: one number in, one window of token ids out."""

from __future__ import annotations

from copy import copy
from pathlib import Path
from typing import Literal

import numpy as np

from longcat.documents import PADDING
from longcat.errors import ConfigError
from train.data.blend import Mixture, shares_of
from train.data.config import DataConfig, Packing
from train.data.corpus import TOKENIZER_NAME, CorpusInfo, verify_corpus
from train.data.epochs import CorpusReader
from train.data.ids import check_range
from train.data.packed import PackedReader
from train.data.stages import Segment, segments

_VALIDATION_SEED = 0


class TokenSamples:
    """Samples of token ids from the corpora of `data.paths`, numbered 0, 1, 2, … without end.

    The window of a number depends only on (seed, number, sequence_length, corpora, weights, stages): not on the number
    of steps, of ranks or of samples read before. Each window occurs once per epoch of its corpus. With
    `data.packing=best_fit` a sample is no window but whole documents and padding. In a stage of another
    sequence length, samples have that length. The validation split has a fixed order, whatever the seed, and ignores
    `data.stages`; `of_length` reads it in windows of a stage's length.

    Attributes:
        num_tokens: tokens of the split, all corpora together, which is one epoch when weights are in
        proportion. num_samples: samples of the split in one epoch of every corpus. is_packed: whether they may end
        with padding.

    Args:
        global_batch_size: samples of a step, before `data.stages` change the length: their starts depend on it.
        cache_dir: folder of the sample indexes.
        fallback_dir: used where ``cache_dir`` cannot be written.
        writes: whether an index that is not there is written; False: it is kept in memory.

    Raises:
        ConfigError: a corpus is missing, damaged, too small where it has a share, or does not fit the vocabulary.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        sequence_length: int,
        seed: int,
        vocab_size: int,
        split: Literal["train", "validation"],
        cache_dir: Path,
        fallback_dir: Path | None = None,
        global_batch_size: int = 1,
        writes: bool = True,
    ) -> None:
        config.validate()
        if sequence_length < 2:
            raise ConfigError(f"train.sequence_length={sequence_length} must be at least 2")
        infos = [_checked_info(prefix, vocab_size) for prefix in config.paths]
        _check_one_tokenizer(config.paths, infos)
        self._vocab_size, self.is_packed = vocab_size, config.packing == Packing.best_fit
        reader_type = PackedReader if self.is_packed else CorpusReader
        self._parts = parts = segments(config.stages, sequence_length, global_batch_size)
        readers = [
            reader_type(
                prefix,
                sequence_length=sequence_length,
                seed=seed if split == "train" else _VALIDATION_SEED,
                split=split,
                validation_fraction=config.validation_fraction,
                cache_dirs=list(dict.fromkeys(Path(folder) for folder in (cache_dir, fallback_dir or cache_dir))),
                info=info,
                writes=writes,
            )
            for prefix, info in zip(config.paths, infos, strict=True)
        ]
        self.num_tokens = sum(reader.num_tokens for reader in readers)
        self._weights = list(config.weights) or [max(reader.epoch_size, 1.0) for reader in readers]
        self._by_length = {sequence_length: readers}
        for part in parts:
            if part.length not in self._by_length:
                self._by_length[part.length] = [reader.of_length(part.length) for reader in readers]
        self._check_lengths(parts, split)
        self._read(sequence_length, parts if split == "train" else parts[:1])

    def _check_lengths(self, parts: list[Segment], split: str) -> None:
        """Raise ConfigError if a corpus that a stage reads is shorter than a sample, or no corpus is long enough.

        Validation is in the first mixture, without corpora that the stage does not read and that are too short for it.
        """
        key = "train.sequence_length"  # that set the length
        for part, shares in zip(parts, shares_of(self._weights, parts), strict=True):
            if part.stage is not None and part.stage.sequence_length is not None:
                key = f"data.stages[{part.number - 1}].sequence_length"
            readers = self._by_length[part.length]
            if split == "validation":
                shares = [share * first for share, first in zip(shares, self._weights, strict=True)]
                pairs = zip(self._weights, readers, strict=True)
                if not any(weight and reader.samples_per_epoch for weight, reader in pairs):
                    shares = self._weights
            for reader, share in zip(readers, shares, strict=True):
                if share:
                    reader.check_has_samples(key)

    def of_length(self, sequence_length: int) -> TokenSamples:
        """The same split in samples of the length of one of `data.stages`, in the first mixture.

        Corpora that are shorter than a sample are left out.
        """
        other = copy(self)
        pairs = zip(self._weights, self._by_length[sequence_length], strict=True)
        other._weights = [weight if reader.samples_per_epoch else 0.0 for weight, reader in pairs]
        other._read(sequence_length, segments([], sequence_length, 1))
        return other

    def of_corpus(self, number: int, sequence_length: int) -> TokenSamples:
        """The same split of one corpus of `data.paths` alone, in windows as of `of_length`."""
        other = copy(self)
        other._by_length = {length: [readers[number]] for length, readers in self._by_length.items()}
        other._weights = [1.0]
        other._read(sequence_length, segments([], sequence_length, 1))
        return other

    def _read(self, sequence_length: int, parts: list[Segment]) -> None:
        self._readers = self._by_length[sequence_length]
        self.num_samples = sum(reader.samples_per_epoch for reader in self._readers)
        self._mixture = Mixture(self._weights, parts)

    def padding(self, stage: int = 0) -> tuple[int, float]:
        """Packed samples in an epoch of every corpus, and the part of the positions that is padding.

        In stage ``stage`` of `data.stages` (0 = before the first), by the shares of its mixture.
        """
        readers, shares = self._by_length[self._parts[stage].length], shares_of(self._weights, self._parts)[stage]
        of_each = [reader.padding_share if isinstance(reader, PackedReader) else 0.0 for reader in readers]
        return sum(reader.samples_per_epoch for reader in readers), float(np.average(of_each, weights=shares))

    def __getitem__(self, index: int) -> np.ndarray:
        """Global sample `index`, int64 [its sequence length + 1]: inputs are [:-1], labels [1:]."""
        reader, number = self._locate(index)
        return self._checked(reader.sample(number), reader.prefix)

    def open_indexes(self, first: int, count: int) -> None:
        """Read or make the indexes that the ``count`` global samples from ``first`` on need."""
        for index in range(first, first + count):
            reader, number = self._locate(index)
            reader.open_index(number)

    def with_documents(self, index: int) -> np.ndarray:
        """Global sample `index` and the number of each token's document in it, int64 [2, its sequence length + 1].

        Padding has the number `longcat.documents.PADDING`.
        """
        reader, number = self._locate(index)
        sample = reader.sample_with_documents(number)
        self._checked(sample[0], reader.prefix)
        return sample

    def texts(self, index: int) -> list[np.ndarray]:
        """Global sample `index` in pieces inside which each token but the first has a label, int64 [length] each."""
        if not self.is_packed:
            return [self[index]]
        ids, numbers = self.with_documents(index)
        ids, numbers = ids[numbers != PADDING], numbers[numbers != PADDING]
        return np.split(ids, np.flatnonzero(np.diff(numbers)) + 1)

    def _locate(self, index: int) -> tuple[CorpusReader, int]:
        """The reader of a global sample, and its number there."""
        if index < 0:
            raise IndexError(f"sample {index}: numbers start at 0")
        corpus, number, length = self._mixture.locate(int(index))
        return self._by_length[length][corpus], number

    def validation_documents(self, count: int) -> list[np.ndarray]:
        """The first `count` documents with tokens of the validation split, int64 [length] each, corpora in turn."""
        if count < 0:
            raise ValueError(f"count={count} is negative")
        found: list[np.ndarray] = []
        for index in range(max(len(reader.validation_documents) for reader in self._readers)):
            for reader in self._readers:
                if len(found) == count:
                    return found
                if index < len(reader.validation_documents):
                    ids = reader.document(int(reader.validation_documents[index]))
                    if ids.size:
                        found.append(self._checked(ids, reader.prefix))
        return found

    def _checked(self, ids: np.ndarray, prefix: str) -> np.ndarray:
        if ids.size:
            check_range(prefix, int(ids.min()), int(ids.max()), self._vocab_size)
        return ids


def _checked_info(prefix: str, vocab_size: int) -> CorpusInfo | None:
    info = verify_corpus(prefix)
    if info is not None:
        check_range(prefix, 0, info.max_token_id, vocab_size)
    return info


def _check_one_tokenizer(paths: list[str], infos: list[CorpusInfo | None]) -> None:
    pairs = zip(paths, infos, strict=True)
    known = [(path, info.tokenizer_sha256) for path, info in pairs if info is not None]
    for path, digest in known[1:]:
        if digest != known[0][1]:
            raise ConfigError(
                f"data.paths: {path} was made with another tokenizer than {known[0][0]}, so ids mean "
                "different text; build "
                f"it with data.tokenizer={Path(known[0][0]).parent / TOKENIZER_NAME}"
            )
