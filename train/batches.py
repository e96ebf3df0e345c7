"""From global sample numbers to this rank's micro-batches."""

# B sequences of a micro-batch, S positions

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longcat.documents import Documents, to_device
from longcat.model import mtp_valid
from parallel.elastic import virtual_ranks
from parallel.mesh import Topology
from parallel.reduce import sum_scalars
from train.config import Config
from train.data.samples import TokenSamples
from train.health.ranges import SampleRanges
from train.objective import Divisors


@dataclass(frozen=True)
class Batch:
    """One micro-batch on this rank's device."""

    tokens: Tensor  # [B, S] int64
    labels: Tensor  # [B, S] the next token of each
    valid: Tensor  # [B, S] bool, True where the label counts
    documents: Documents | None  # with data.mask_documents


class BatchReader:
    """Divides a global batch into micro-batches; data-parallel rank r reads the r-th contiguous share of them.

    With `train.elastic_bits` it reads those of its virtual ranks.
    """

    def __init__(self, samples: TokenSamples, config: Config, topology: Topology) -> None:
        self.samples = samples
        self.config = config
        self.topology = topology
        self.size = config.train.micro_batch_size
        self.num_micro_batches = config.train.global_batch_size // self.size
        self.left_out = SampleRanges()  # samples that are passed over; positions count the others

    def numbers(self, data_rank: int) -> list[int]:
        """The numbers of a data rank's micro-batches in the global batch."""
        virtual = virtual_ranks(self.config.train.elastic_bits, self.topology.sizes)
        if virtual is not None:
            return virtual.micro_batches(data_rank, self.num_micro_batches)
        share = self.num_micro_batches // self.topology.data_ranks
        return list(range(data_rank * share, (data_rank + 1) * share))

    def read(self, first_sample: int, data_rank: int | None = None) -> Iterator[Batch]:
        """The micro-batches of a data rank, by default this one, of the global batch ``first_sample`` ..., in order."""
        for number in self.numbers(self.topology.data_rank if data_rank is None else data_rank):
            yield self.micro_batch(first_sample + number * self.size)

    def micro_batch(self, first_sample: int) -> Batch:
        """The samples at the positions ``first_sample`` ... ``first_sample + micro_batch_size - 1``."""
        windows = np.stack([self.samples[self.left_out.place(first_sample + row)] for row in range(self.size)])
        return self.to_batch(torch.from_numpy(windows))

    def to_batch(self, windows: Tensor) -> Batch:
        """Windows [B, S+1] → inputs and labels."""
        device, documents = self.topology.device, None
        if self.config.data.mask_documents:  # before the copy: bounds of documents are needed on the host
            documents = Documents.of(document_numbers(windows[:, :-1], self.samples.eod), device)
        windows = to_device(windows, device)
        tokens, labels = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
        return Batch(tokens, labels, torch.ones_like(tokens, dtype=torch.bool), documents)

    def divisors(self, batches: list[Batch]) -> Divisors:
        """The divisors of this step's sums; a collective."""
        tokens = self.config.train.global_batch_size * self.config.train.sequence_length
        counts = label_counts(batches, self.config.model.num_mtp_layers)
        if self.config.data.mask_documents:
            weight = float(self.topology.reads_first)  # ranks that share a batch count it once
            labels, mtp_labels = sum_scalars([count * weight for count in counts])
        else:  # every window has as many labels: no collective needed
            labels, mtp_labels = (count * self.topology.data_ranks for count in counts)
        return Divisors(int(labels), int(mtp_labels), tokens, self.num_micro_batches)


def document_numbers(tokens: Tensor, eod: int) -> Tensor:
    """Document numbers 0, 1, 2 … in each row [B, S]; an end-of-document token belongs to the document it ends."""
    ends = (tokens == eod).to(torch.int64)
    return ends.cumsum(1) - ends


def label_counts(batches: list[Batch], num_mtp_layers: int) -> list[float]:
    """[labels of the language model, labels of the MTP layers] in ``batches``."""
    main = sum(int(batch.valid.sum()) for batch in batches)
    further = sum(
        int(mtp_valid(batch.valid, batch.documents, depth).sum())
        for batch in batches
        for depth in range(1, num_mtp_layers + 1)
    )
    return [float(main), float(further)]
