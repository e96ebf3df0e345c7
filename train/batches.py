"""From global sample numbers to this rank's micro-batches."""

# B sequences of a micro-batch, S positions

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from longcat.documents import PADDING, Documents, to_device
from longcat.errors import ConfigError
from longcat.model import mtp_valid
from parallel.elastic import virtual_ranks
from parallel.mesh import Topology
from parallel.reduce import sum_scalars
from train.config import Config
from train.data.config import Packing
from train.data.samples import TokenSamples
from train.health.ranges import SampleRanges
from train.objective import Divisors
from train.read_ahead import ReadAhead


@dataclass(frozen=True)
class Batch:
    """One micro-batch on this rank's device."""

    tokens: Tensor  # [B, S] int64
    labels: Tensor  # [B, S] the next token of each
    valid: Tensor  # [B, S] bool, True where the label counts
    documents: Documents | None  # with data.mask_documents
    # of the language model and of all MTP layers, counted before the copy to the device; None: count when asked
    num_labels: tuple[int, int] | None = None
    num_padding: int = 0  # positions that hold no text, counted likewise
    num_attended: int = 0  # pairs of a token and a key that it attends to, likewise


class BatchReader:
    """Divides a global batch into micro-batches; data-parallel rank r reads the r-th contiguous share of them.

    With `train.elastic_bits` it reads those of its virtual ranks. ``reads_ahead``: a thread reads the next global batch
    while this one is trained on, until `close`. ``end``: the sample number with which another stage begins; a batch
    that has it, or a later one, is neither read nor read ahead.
    """

    def __init__(
        self,
        samples: TokenSamples,
        config: Config,
        topology: Topology,
        *,
        reads_ahead: bool = False,
        end: int | None = None,
    ) -> None:
        self.samples = samples
        self.config = config
        self.topology = topology
        self.size = config.train.micro_batch_size
        self.num_micro_batches = config.train.global_batch_size // self.size
        self.left_out = SampleRanges()  # samples that are passed over; positions count the others
        self.reads_ahead, self.end = reads_ahead, end
        self.ahead = ReadAhead(self._read)

    def numbers(self, data_rank: int) -> list[int]:
        """The numbers of a data rank's micro-batches in the global batch."""
        virtual = virtual_ranks(self.config.train.elastic_bits, self.topology.sizes)
        if virtual is not None:
            return virtual.micro_batches(data_rank, self.num_micro_batches)
        share = self.num_micro_batches // self.topology.data_ranks
        return list(range(data_rank * share, (data_rank + 1) * share))

    def read(self, first_sample: int, data_rank: int | None = None) -> Iterator[Batch]:
        """The micro-batches of a data rank, by default this one, of the global batch ``first_sample`` ..., in order.

        With ``reads_ahead`` the next global batch's samples of this rank are then read ahead.

        Raises:
            ConfigError: the batch reaches into another stage.
        """
        size = self.config.train.global_batch_size
        if self.end is not None and (last := self.left_out.place(first_sample + size - 1)) >= self.end:
            raise ConfigError(
                f"the {size} samples of a step end with sample {last}, in the stage of data.stages that begins with "
                f"sample {self.end}; set train.global_batch_size so that whole steps lead to it"
            )
        numbers = self.numbers(self.topology.data_rank if data_rank is None else data_rank)
        places = self._places(first_sample, numbers)
        is_own = data_rank is None  # else a neighbour's, and what was read ahead stays
        windows = self.ahead.take(places) if is_own else self.ahead.read(places)
        if is_own and self.reads_ahead:
            following = self._places(first_sample + size, numbers)
            if self.end is None or following[-1] < self.end:
                self.ahead.ask(following)
        for first in range(0, len(windows), self.size):
            yield self.to_batch(torch.from_numpy(np.stack(windows[first : first + self.size])))

    def read_first(self, first_sample: int, end: int) -> list[Batch]:
        """As `read`, but no label of the samples from ``end`` on counts: engines need whole global batches."""
        batches = list(self.read(first_sample))
        if first_sample + self.config.train.global_batch_size <= end:
            return batches
        rows = torch.arange(self.size, device=self.topology.device)
        begins = [first_sample + number * self.size for number in self.numbers(self.topology.data_rank)]
        return [
            replace(batch, valid=batch.valid & (rows < end - begin)[:, None], num_labels=None)
            for begin, batch in zip(begins, batches, strict=True)
        ]

    def close(self) -> None:
        """End the thread that reads ahead."""
        self.ahead.close()

    def _places(self, first_sample: int, micro_batches: list[int]) -> list[int]:
        """The numbers of the samples of some micro-batches of the global batch ``first_sample`` ...."""
        positions = (first_sample + number * self.size + row for number in micro_batches for row in range(self.size))
        return [self.left_out.place(position) for position in positions]

    def _read(self, number: int) -> np.ndarray:
        """A sample: token ids [S + 1], with `data.mask_documents` over the numbers of their documents [2, S + 1]."""
        return self.samples.with_documents(number) if self.config.data.mask_documents else self.samples[number]

    def to_batch(self, windows: Tensor) -> Batch:
        """Windows [B, S+1], or [B, 2, S+1] with the number of each token's document → inputs and labels.

        With `data.mask_documents`, windows without numbers are of one document each. With `data.packing=best_fit` no
        label crosses documents.
        """
        numbers = torch.zeros_like(windows) if windows.ndim == 2 else windows[:, 1]
        windows = windows if windows.ndim == 2 else windows[:, 0]
        device, documents, of_documents, valid = self.topology.device, None, None, None
        is_packed = self.config.data.packing == Packing.best_fit
        if self.config.data.mask_documents:  # before the copy: bounds of documents are needed on the host
            of_documents = numbers[:, :-1].contiguous()
            documents = Documents.of(of_documents, device, may_pad=is_packed)
        if is_packed:
            valid = (numbers[:, 1:] == numbers[:, :-1]) & (numbers[:, 1:] != PADDING)
        num_labels = count_labels(windows[:, 1:].shape, of_documents, self.config.model.num_mtp_layers, valid)
        num_padding, num_attended = int((numbers[:, :-1] == PADDING).sum()), count_attended(numbers[:, :-1])
        windows = to_device(windows, device)
        tokens, labels = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        counted = torch.ones_like(tokens, dtype=torch.bool) if valid is None else to_device(valid, device)
        return Batch(tokens, labels, counted, documents, num_labels, num_padding, num_attended)

    def divisors(self, batches: list[Batch]) -> Divisors:
        """The divisors of this step's sums; a collective."""
        positions = self.config.train.global_batch_size * self.config.train.sequence_length
        counts = label_counts(batches, self.config.model.num_mtp_layers)
        counts += [float(sum(batch.num_padding for batch in batches)), float(sum(one.num_attended for one in batches))]
        if self.config.data.mask_documents:
            weight = float(self.topology.reads_first)  # ranks that share a batch count it once
            counts = sum_scalars([count * weight for count in counts])
        else:  # every window has as many labels: no collective needed
            counts = [count * self.topology.data_ranks for count in counts]
        labels, mtp_labels, padding, attended = map(int, counts)
        return Divisors(labels, mtp_labels, positions - padding, self.num_micro_batches, padding, attended)


def count_labels(
    shape: torch.Size, of_documents: Tensor | None, num_mtp_layers: int, valid: Tensor | None = None
) -> tuple[int, int]:
    """Labels of the language model and of the MTP layers in a micro-batch [B, S], on the host.

    ``valid`` [B, S]: where the label counts, with ``of_documents``; None = everywhere.
    """
    rows, length = shape
    further = 0
    for depth in range(1, num_mtp_layers + 1):
        if of_documents is None:
            further += rows * max(length - depth, 0)
        elif depth < length:  # a document number never falls: equal ones are in one document
            is_inside = of_documents[:, depth:] == of_documents[:, :-depth]
            further += int((is_inside if valid is None else is_inside & valid[:, depth:]).sum())
    return rows * length if valid is None else int(valid.sum()), further


def count_attended(of_documents: Tensor) -> int:
    """Pairs of a token and a key that it attends to in a micro-batch of document numbers [B, S]; padding has none."""
    position = torch.arange(of_documents.shape[1])
    begins = torch.zeros_like(of_documents)
    begins[:, 1:] = torch.where(of_documents[:, 1:] != of_documents[:, :-1], position[1:], 0)
    keys = position + 1 - begins.cummax(1).values
    return int(keys[of_documents != PADDING].sum())


def label_counts(batches: list[Batch], num_mtp_layers: int) -> list[float]:
    """[labels of the language model, labels of the MTP layers] in ``batches``."""
    main = further = 0
    for batch in batches:
        if batch.num_labels is not None:
            main, further = main + batch.num_labels[0], further + batch.num_labels[1]
            continue
        main += int(batch.valid.sum())
        for depth in range(1, num_mtp_layers + 1):
            further += int(mtp_valid(batch.valid, batch.documents, depth).sum())
    return [float(main), float(further)]
