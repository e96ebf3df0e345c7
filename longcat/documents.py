"""Which document each position of a micro-batch belongs to, as attention, MTP and fused kernels need it."""

# B sequences, S positions

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """The stretches in which a range of queries attends: one for each document and sequence that the range touches.

    The queries ``start`` … ``stop`` of all sequences in one row, and the keys from ``firsts[b]`` to ``stop`` of
    sequence b likewise, fall into segments that end together: within one, the last query sees all keys.
    """

    firsts: tuple[int, ...]  # by sequence: the first key that any query of the range sees
    stop: int
    query_bounds: Tensor  # int32 [segments + 1], on the device: where each segment's queries begin, and their number
    key_bounds: Tensor  # likewise its keys
    longest_queries: int
    longest_keys: int


@dataclass(frozen=True, eq=False)
class Documents:
    """Document numbers of a micro-batch, and their bounds on the host, so that no kernel waits for the device.

    Args:
        numbers: [B, S] int64 on the device; a number changes where a document begins, and never comes again.
        starts: by sequence, the first position of each document, ascending; the first is 0.
    """

    numbers: Tensor
    starts: tuple[tuple[int, ...], ...]
    _segments: dict[tuple[int, int], Segments] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, numbers: Tensor, device: torch.device | None = None) -> Documents:
        """From numbers [B, S] on the host; they go to ``device``, if one is given."""
        changes = torch.ones_like(numbers, dtype=torch.bool)
        changes[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
        starts = tuple(tuple(row.nonzero().flatten().tolist()) for row in changes)
        return cls(numbers if device is None else to_device(numbers, device), starts)

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
