"""Which document each position of a micro-batch belongs to, and which ones are padding."""

# B sequences, S positions

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:  # it imports the dispatcher's interface, which needs nothing of this file
    from longcat.interfaces import SequenceSharding

PADDING = -1  # the document number of positions that hold no text


@dataclass(frozen=True)
class Segments:
    """Where each document begins among the queries and keys of a range, for a kernel that attends within documents.

    The queries ``start`` … ``stop`` - 1 of all sequences follow one another in one row, and so do the keys
    ``firsts[b]`` … ``stop`` - 1 of each sequence b. A segment is one document in one sequence: its queries attend only
    to its keys. Its last query and its last key are at the same position, so the last query attends to all its keys.
    """

    firsts: tuple[int, ...]  # by sequence: the first key that any query of the range sees
    stop: int
    query_bounds: Tensor  # int32 [segments + 1], on the device: where each segment's queries begin, and their number
    key_bounds: Tensor  # likewise its keys
    longest_queries: int
    longest_keys: int


@dataclass(frozen=True, eq=False)
class Padding:
    """The positions of a micro-batch that hold no text: they use no FFN expert and count in no loss or statistic."""

    mask: Tensor  # [B, S] bool on the device, True at padding
    num_tokens: Tensor  # [] int64 on the device, the number of the other positions
    _local: dict[int, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, mask: Tensor, device: torch.device | None = None) -> Padding:
        """From a mask [B, S] on the host; it goes to ``device``, if one is given."""
        num_tokens = (~mask).sum().clamp_min(1)
        return cls(mask, num_tokens) if device is None else cls(to_device(mask, device), to_device(num_tokens, device))

    def local(self, sequence: SequenceSharding) -> Tensor:
        """The mask at the positions of the residual stream here, [B, s]; found once a micro-batch."""
        if sequence.num_shards == 1:
            return self.mask
        if sequence.num_shards not in self._local:
            positions = to_device(sequence.positions(self.mask.shape[1]), self.mask.device)
            self._local[sequence.num_shards] = self.mask[:, positions]
        return self._local[sequence.num_shards]


@dataclass(frozen=True, eq=False)
class Documents:
    """Document numbers of a micro-batch, and their bounds on the host, so that no kernel waits for the device.

    Args:
        numbers: [B, S] int64 on the device; a number changes where a document begins, and never comes again.
        starts: by sequence, the first position of each document, ascending; the first is 0.
        padding: where samples may be padded, which positions are padding; they are documents of their own.
    """

    numbers: Tensor
    starts: tuple[tuple[int, ...], ...]
    padding: Padding | None = None
    _segments: dict[tuple[int, int], Segments] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, numbers: Tensor, device: torch.device | None = None, may_pad: bool = False) -> Documents:
        """From numbers [B, S] on the host; they go to ``device``, if one is given.

        With ``may_pad`` the positions with the number `PADDING` are padding.
        """
        changes = torch.ones_like(numbers, dtype=torch.bool)
        changes[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        starts = tuple(tuple(row.nonzero().flatten().tolist()) for row in changes)
        padding = Padding.of(numbers == PADDING, device) if may_pad else None
        return cls(numbers if device is None else to_device(numbers, device), starts, padding)

    def first_key(self, position: int) -> int:
        """The first key that ``position`` sees in any sequence: where the longest of their documents began."""
        return min(self.start_of(sequence, position) for sequence in range(len(self.starts)))

    def start_of(self, sequence: int, position: int) -> int:
        """Where the document of a position begins."""
        starts = self.starts[sequence]
        return starts[bisect_right(starts, position) - 1]

    def segments(self, start: int, stop: int) -> Segments:
        """The segments of the queries ``start`` … ``stop``; computed once a micro-batch, for all its attention."""
        if (start, stop) not in self._segments:
            self._segments[start, stop] = self._find_segments(start, stop)
        return self._segments[start, stop]

    def _find_segments(self, start: int, stop: int) -> Segments:
        firsts = tuple(self.start_of(sequence, start) for sequence in range(len(self.starts)))
        query_lengths, key_lengths = [], []
        for first, starts in zip(firsts, self.starts, strict=True):
            begins = [first, *(begin for begin in starts if start < begin < stop)]
            ends = [*begins[1:], stop]
            key_lengths += [end - begin for begin, end in zip(begins, ends, strict=True)]
            query_lengths += [end - max(begin, start) for begin, end in zip(begins, ends, strict=True)]
        return Segments(
            firsts,
            stop,
            self._bounds(query_lengths),
            self._bounds(key_lengths),
            max(query_lengths),
            max(key_lengths),
        )

    def _bounds(self, lengths: list[int]) -> Tensor:
        bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        bounds[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        return to_device(bounds, self.numbers.device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, by a copy that no one waits for."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
