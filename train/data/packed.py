"""Samples of whole documents (`data.packing=best_fit`), epoch after epoch.

Attention stays inside documents, so it does not matter which ones share a sample: the packing is made once for a split
and a length, whatever the seed, and an epoch is another order of the same samples.
"""

from __future__ import annotations

import numpy as np

from longcat.documents import PADDING
from train.data.epochs import SPLIT_SEED, CorpusReader, EpochIndex
from train.data.packing import MIN_PIECE, pack, share_padded

PADDING_ID = 0  # any id would do: nothing depends on it


class PackedReader(CorpusReader):
    """As `CorpusReader`; a sample is whole documents, then padding."""

    def _count_samples(self) -> int:
        names = ("pieces", "bounds")
        self._packed = self._read_or_build("packed", [*self._identity, "best_fit"], names, self._pack)
        return len(self._packed[1]) - 1

    @property
    def padding_share(self) -> float:
        """The part of an epoch's positions that is padding."""
        pieces, bounds = self._packed
        return share_padded(pieces, bounds, self._sequence_length)

    def _epoch_size(self) -> float:
        return float(self.samples_per_epoch)  # in an epoch of a mixture, each corpus is read once

    def _too_small(self, fraction: float, key: str) -> str:
        return (
            f"no document of the {self.split} split of the corpus {self.prefix} has {MIN_PIECE} tokens, so there is "
            f"nothing to predict; build a larger corpus"
        )

    def _pack(self) -> tuple[np.ndarray, ...]:
        """Pack the documents in a random order, so that those of one length in a sample have different sources."""
        bounds = np.asarray(self._index.bounds)
        tokens = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(self._index.lengths, dtype=np.int64)])
        documents = np.random.RandomState(SPLIT_SEED).permutation(np.flatnonzero(self.documents()))
        starts = tokens[bounds[documents]]
        return pack(starts, tokens[bounds[documents + 1]] - starts, self._sequence_length)

    def _index_of(self, seed: int) -> EpochIndex:
        """The order of an epoch's samples, in a tuple."""

        def build() -> EpochIndex:
            return (np.random.RandomState(seed).permutation(self.samples_per_epoch),)

        return self._read_or_build("order", [*self._identity, "best_fit", seed], ("order",), build)

    def sample(self, number: int) -> np.ndarray:
        return self.sample_with_documents(number)[0]

    def sample_with_documents(self, number: int) -> np.ndarray:
        """Token ids, and the number within the sample of each one's document, int64 [2, sequence_length + 1].

        Numbers start at 0; padding, at the end, has the number `PADDING`.
        """
        epoch, position = divmod(number, self.samples_per_epoch)
        place = int(self._epoch(epoch)[0][position])
        pieces, bounds = self._packed
        sample = np.empty((2, self._sequence_length + 1), dtype=np.int64)
        sample[0], sample[1] = PADDING_ID, PADDING
        end, size = 0, self._index.dtype.itemsize
        for document, (start, length) in enumerate(pieces[bounds[place] : bounds[place + 1]].tolist()):
            sample[0, end : end + length] = self._tokens.read(length, start * size)
            sample[1, end : end + length] = document
            end += length
        return sample
