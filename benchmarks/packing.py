"""What best-fit packing saves and costs: documents cut without it, padding and attention with it, and the time.

python -m benchmarks.packing [PREFIX]        PREFIX of a corpus (default data/python_source/corpus)
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.common import print_json, print_table
from longcat.documents import PADDING, Documents
from longcat.ops.attention import first_keys, query_blocks
from train.data.corpus import read_info
from train.data.epochs import CorpusReader, SplitName
from train.data.packed import PackedReader
from train.data.packing import pack, share_padded

LENGTHS = (256, 1024, 4096)
MANY = 1_000_000  # documents of log-normal lengths, for the time
COLUMNS = [
    "documents", "sequence length", "cut without packing, of those that fit", "padding",
    "attention computed, of that without masks", "of it for padding", "seconds to pack",
]  # fmt: skip


def share_cut(reader: CorpusReader, length: int) -> float:
    """The share of documents of one sequence that fit a sample and are cut in the first epoch."""
    reader = reader.of_length(length)
    sequences, _, _ = reader._epoch(0)
    sizes = np.asarray(reader._index.lengths)[sequences].astype(np.int64)
    fits = (sizes >= 2) & (sizes <= length + 1)
    first = np.cumsum(sizes) - sizes
    is_cut = first // length != (first + sizes - 2) // length  # of its first and of its last label's sample
    return float((is_cut & fits).sum() / fits.sum())


def attention_shares(reader: PackedReader, length: int) -> tuple[float, float]:
    """Query-key pairs that a CPU computes for an epoch's samples, over those without masks, and padding's part."""
    without, computed, padding, bounds = 0, 0, 0, [(0, length)]
    for number in range(reader.samples_per_epoch):
        numbers = torch.from_numpy(reader.sample_with_documents(number)[1, None, :length])
        firsts = first_keys(Documents.of(numbers), bounds, length)
        for _, start, stop, first in query_blocks(bounds, length, firsts):
            without += (stop - start) * stop
            computed += (stop - start) * (stop - first)
            padding += int((numbers[0, start:stop] == PADDING).sum()) * (stop - first)
    return computed / without, padding / computed


def readers(prefix: str, split: SplitName, folder: Path) -> list[CorpusReader]:
    """Of one split: the samples that are cut anywhere, and the packed ones."""
    return [
        kind(
            prefix,
            sequence_length=LENGTHS[0],
            seed=0,
            split=split,
            validation_fraction=0.02,
            cache_dirs=[folder],
            info=read_info(prefix),
        )
        for kind in (CorpusReader, PackedReader)
    ]


def main() -> None:
    prefix = sys.argv[1] if len(sys.argv) > 1 else "data/python_source/corpus"
    rows: list[list[str]] = []
    splits: list[SplitName] = ["train", "validation"]
    with TemporaryDirectory() as folder:
        for split in splits:
            plain, packed = readers(prefix, split, Path(folder))
            for length in LENGTHS:
                reader = packed.of_length(length)
                assert isinstance(reader, PackedReader)
                start = time.perf_counter()
                pieces, bounds = reader._pack()
                seconds = time.perf_counter() - start
                padding = share_padded(pieces, bounds, length)
                name = f"{int(reader.documents().sum())} of {split}"
                computed, for_padding = attention_shares(reader, length)
                shares = [f"{share_cut(plain, length):.0%}", f"{padding:.2%}", f"{computed:.1%}", f"{for_padding:.2%}"]
                rows.append([name, str(length), *shares, f"{seconds:.2f}"])
    lengths = np.minimum(np.random.default_rng(0).lognormal(6.5, 1.1, MANY).astype(np.int64) + 1, 400_000)
    for length in (2048, 8192, 131_072):
        start = time.perf_counter()
        pieces, bounds = pack(np.cumsum(lengths) - lengths, lengths, length)
        seconds = time.perf_counter() - start
        padding = share_padded(pieces, bounds, length)
        rows.append([f"{MANY} log-normal", str(length), "", f"{padding:.4%}", "", "", f"{seconds:.1f}"])
    print_table("Best-fit packing", COLUMNS, rows)
    print_json("packing", {"columns": COLUMNS, "rows": rows})


if __name__ == "__main__":
    main()
