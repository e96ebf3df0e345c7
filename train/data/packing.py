"""Best-fit packing: documents into samples of a fixed size, so that none is cut that fits one sample.

Best-fit decreasing (Johnson et al. 1974; for language models Ding et al. 2024, "Fewer Truncations Improve Language
Modeling"): the longest document first, each into the sample with the least room that it fits. Documents of one length
are placed at once, so the work grows with the number of different lengths and of numpy's passes over the documents.
"""

# P pieces of documents

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

MIN_PIECE = 2  # tokens: a shorter one has no label


def pack(starts: np.ndarray, lengths: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Samples of ``sequence_length`` + 1 tokens from documents.

    A longer document is cut into whole samples, of which each begins with the last token of the one before, as its last
    label is that one's first input; the rest is packed like a document. So each token but a document's first is a label
    once. Documents of one token are left out.

    Args:
        starts: the first token of each document, int64 [documents].
        lengths: its number of tokens, int64 [documents].

    Returns:
        pieces (first token, tokens), sample after sample, int64 [P, 2]; the first piece of each sample, and the number
        of pieces, int64 [samples + 1].
    """
    whole = np.maximum(lengths - 1, 0) // sequence_length  # samples that each document fills
    first = np.cumsum(whole) - whole
    number = np.arange(int(whole.sum())) - np.repeat(first, whole)  # within the document
    full = np.repeat(starts, whole) + number * sequence_length

    rests = lengths - whole * sequence_length
    kept = rests >= MIN_PIECE
    sizes, begins = rests[kept], (starts + whole * sequence_length)[kept]
    samples, num_samples = best_fit(sizes, sequence_length + 1)
    order = np.argsort(samples, kind="stable")  # within a sample, documents stay in the order that they came in
    pieces = np.concatenate(
        [
            np.stack([full, np.full(len(full), sequence_length + 1)], 1),
            np.stack([begins[order], sizes[order]], 1),
        ]
    )
    pieces_each = np.concatenate([np.ones(len(full), dtype=np.int64), np.bincount(samples, minlength=num_samples)])
    return pieces.astype(np.int64), np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(pieces_each)])


def share_padded(pieces: np.ndarray, bounds: np.ndarray, sequence_length: int) -> float:
    """The part of the samples' positions that holds no text, of what `pack` returns.

    A sample has one token more than positions: its last label.
    """
    if len(bounds) < 2:
        return 0.0
    tokens = np.add.reduceat(pieces[:, 1], bounds[:-1])
    return float(1 - (np.minimum(tokens, sequence_length) / sequence_length).mean())


def best_fit(sizes: np.ndarray, capacity: int) -> tuple[np.ndarray, int]:
    """The bin of each item by best-fit decreasing, int64 [items], and the number of bins of ``capacity``.

    Sizes are at least `MIN_PIECE` and at most the capacity.
    """
    bin_of = np.empty(len(sizes), dtype=np.int64)
    num_bins = 0
    rooms: list[int] = []  # of bins in use, ascending, each once
    by_room: dict[int, list[np.ndarray]] = {}  # the bins with as much room

    def give_back(bins: np.ndarray, room: int) -> None:
        if len(bins) and room >= MIN_PIECE:
            if room not in by_room:
                insort(rooms, room)
            whole = bins if bins.base is None else bins.base  # which a view keeps in memory
            by_room.setdefault(room, []).append(bins.copy() if 2 * len(bins) < len(whole) else bins)

    decreasing = np.argsort(-sizes, kind="stable")
    ends = np.flatnonzero(np.diff(sizes[decreasing])) + 1
    for items in np.split(decreasing, ends) if len(sizes) else []:
        size, left = int(sizes[items[0]]), items
        while len(left):
            at = bisect_left(rooms, size)
            if at == len(rooms):
                room = capacity
                bins = num_bins + np.arange(-(-len(left) // (capacity // size)))
                num_bins += len(bins)
            else:
                room = rooms[at]
                bins = by_room[room].pop()  # not all of them: joining them each time is quadratic
                if not by_room[room]:
                    del rooms[at], by_room[room]
            each = room // size  # with one more item, a bin has less room than any other: the next one goes there too
            used = min(-(-len(left) // each), len(bins))
            taken = min(len(left), used * each)
            bin_of[left[:taken]] = np.repeat(bins[:used], each)[:taken]
            give_back(bins[: used - 1], room - each * size)
            give_back(bins[used - 1 : used], room - (taken - (used - 1) * each) * size)
            give_back(bins[used:], room)
            left = left[taken:]
    return bin_of, num_bins
