"""Asynchronous all-gather and reduce-scatter: NCCL's on a GPU, messages between each pair of ranks on a CPU.

Gloo's all-gather is a ring, and its reduce-scatter reduces the whole tensor on every rank. Between two processes of one
machine they moved 0.5 and 0.4 GB/s, direct messages 1.3. The price: with many ranks on each of several machines, more
bytes pass between the machines.
"""

# n ranks of the group

from __future__ import annotations

from collections import Counter
from datetime import timedelta
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.sdc.ledger import LEDGER

started: Counter[str] = Counter()  # collectives by the name of their group


def all_gather(out: Tensor, x: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Bring ``x`` [...] of every rank to ``out`` [n, ...]; ``x`` may be this rank's part of ``out``."""
    if not _directly(out, group):
        work = dist.all_gather_single(out.flatten(0, 1), x, group, async_op=True)
        assert work is not None
        return work
    own = out[group.rank()]
    if own.data_ptr() != x.data_ptr():
        own.copy_(x)
    return Messages("all-gather", group, [own] * group.size(), list(out))


def reduce_scatter(
    out: Tensor, x: Tensor, group: dist.ProcessGroup, label: str = "reduce-scatter", branches: int = 1
) -> dist.Work:
    """Sum ``x`` [n, ...] over ranks and leave this rank's part in ``out`` [...]; on a CPU by `tree_sum`.

    ``label`` names it in messages. With ``branches`` above 1, ``x`` is overwritten.
    """
    if not _directly(out, group):
        return dist.reduce_scatter_single(out, x.flatten(0, 1), group=group, async_op=True)
    return Sum(group, x, out, label, branches)


def tree_sum(terms: list[Tensor], branches: int) -> Tensor:
    """Σ of ``terms`` [n], overwriting them: each n / ``branches`` neighbours in order, their sums as a binary tree.

    ``branches`` is a power of two that divides n.
    """
    length = len(terms) // branches
    sums = []
    for first in range(0, len(terms), length):
        total = terms[first]
        for term in terms[first + 1 : first + length]:
            total.add_(term)
        sums.append(total)
    while len(sums) > 1:
        sums = [left.add_(right) for left, right in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0]


def _directly(tensor: Tensor, group: dist.ProcessGroup) -> bool:
    return tensor.device.type == "cpu" and group.size() > 1


class Messages(dist.Work):
    """One message in flight to each other rank of a group and one from it.

    A tag of kind, size and the group's count of collectives matches messages: ranks that do not start the same
    collectives in the same order time out, as in a collective of the backend.
    """

    def __init__(self, kind: str, group: dist.ProcessGroup, sent: list[Tensor], received: list[Tensor]) -> None:
        """Tensors [n] by rank, contiguous and of one size; a rank's own entries are not used."""
        super().__init__()
        self.works: list[dist.Work | None] = []
        self.sent = sent  # kept until the messages have left
        self.failed: RuntimeError | None = None
        rank, size = group.rank(), group.size()
        started[group.group_name] += 1
        tag = crc32(f"{kind} {started[group.group_name]} {sent[rank].nbytes}".encode()) >> 1
        for offset in range(1, size):  # each starts with its next rank, so that no rank gets all messages at once
            source, target = (rank - offset) % size, (rank + offset) % size
            self.works.append(dist.irecv(received[source], group=group, tag=tag, group_src=source))
            self.works.append(dist.isend(sent[target], group=group, tag=tag, group_dst=target))

    def wait(self, timeout: timedelta | None = None) -> bool:
        """After an error, raise the same error again without another wait."""
        if self.failed is not None:
            raise self.failed
        try:
            for work in self.works:
                assert work is not None
                work.wait() if timeout is None else work.wait(timeout)
        except RuntimeError as error:
            self.failed = error
            raise
        self.works, self.sent = [], []
        return True


class Sum(Messages):
    """A reduce-scatter in flight; the wait adds the parts in rank order, or as a tree of ``branches``."""

    def __init__(self, group: dist.ProcessGroup, x: Tensor, out: Tensor, label: str, branches: int = 1) -> None:
        sent = list(x)
        self.out, self.label, self.group, self.branches = out, label, group, branches
        self.parts = [part if rank == group.rank() else torch.empty_like(part) for rank, part in enumerate(sent)]
        super().__init__("reduce-scatter", group, sent, self.parts)
        self.number = LEDGER.send_parts(label, group, sent)

    def wait(self, timeout: timedelta | None = None) -> bool:
        super().wait(timeout)
        if self.parts:
            LEDGER.receive_parts(self.label, self.group, self.number, self.parts)
        if self.parts and self.branches > 1:
            self.out.copy_(tree_sum(self.parts, self.branches))
        elif self.parts:
            first, second, *others = self.parts
            torch.add(first, second, out=self.out)
            for part in others:
                self.out += part
        self.parts = []
        return True
