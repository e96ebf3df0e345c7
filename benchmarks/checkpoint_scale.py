"""What a checkpoint's index and the sample index cost at 1,024 and 10,240 ranks, from counts and timed parts.

    python -m benchmarks.checkpoint_scale --out scale.json

Counted: the boxes of model=flash's weights and moments on one rank of each pipeline stage in a world of that size,
whose other ranks do not exist. Timed, on the boxes of one stage's ranks: what the first rank does for each box of the
whole checkpoint, as torch plans and ends a save and as this project does (`train/checkpoint/index.py`), and reading the
index. Timed, on a corpus of which only the document lengths exist: an epoch's sample index. Writing and reading the
values themselves depends on the file system and is not in it.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.storage import WriteResult

from benchmarks.common import print_json, print_table
from launch.plan.cluster import find_cluster
from launch.plan.plan import read
from launch.plan.trace import build, fake_topology, state_without_values
from longcat.garbage import no_collections
from longcat.names import Box
from longcat.ops.torch_internals import fake_tensor_mode
from parallel.plan.recorder import AllocationRecorder, recording
from parallel.sizes import resolve_sizes
from parallel.torch_internals import record_place
from train.check import batch_shape
from train.checkpoint.dcp_tensors import STEP, DcpTensor
from train.checkpoint.index import Placement, entries, items_to_write, write_index
from train.checkpoint.shards import METADATA, ShardReader
from train.config import Config
from train.data.index_files import publish_index, read_index
from train.data.megatron_index import build_index, megatron_builder

LAYOUTS = {
    1024: ["parallel.pp=4", "parallel.cp=8", "parallel.ep=32"],
    10240: ["parallel.pp=10", "parallel.schedule=zbv", "parallel.cp=8", "parallel.ep=32"],
}
DOCUMENTS, DOCUMENT_TOKENS, LENGTH = 2_000_000, 1000, 8192  # of the corpus that is timed; tokens of a sample
CORPUS_TOKENS = 10**12  # that the sample index is projected to

NOTES = [
    "Layouts of model=flash: "
    + "; ".join(f"{world:,} ranks with {' '.join(words)}" for world, words in LAYOUTS.items()),
    f"Timed on the boxes of all ranks of one pipeline stage of the smaller world. The sample index: {DOCUMENTS:,} "
    f"documents of {DOCUMENT_TOKENS:,} tokens, samples of {LENGTH:,} were timed, {CORPUS_TOKENS:.0e} tokens projected.",
    "Not in it: writing and reading the values, the network, the file system.",
]

Boxes = list[tuple[str, tuple[int, ...], Box]]  # key, full shape, box


def config_of(world: int) -> Config:
    words = ["model=flash", "plan.cluster=h800", f"plan.ranks={world}", "train.dtype=bfloat16", *LAYOUTS[world]]
    return read([*words, f"train.sequence_length={LENGTH}", f"train.global_batch_size={world // 2}"])[0]


def boxes_of(world: int, rank: int) -> Boxes:
    """The stored weights and moments of one rank, whose values are not made."""
    config = config_of(world)
    sizes = resolve_sizes(config.parallel, world)
    mode, recorder = fake_tensor_mode(), AllocationRecorder(find_cluster("h800").rates())
    with ExitStack() as stack, no_collections():
        topology = stack.enter_context(fake_topology(sizes, rank, world))
        stack.enter_context(state_without_values(mode, recorder))
        stack.enter_context(recording(recorder))
        state = build(config, topology, batch_shape(config, sizes), recorder, mode)
        found = [(one.key, one.shape, one.box) for one in state.store.local_boxes()]
    return [(key, shape, box) for key, shape, box in found if all(stop > start for start, stop in box)]


def moved(shape: tuple[int, ...], box: Box, place: int) -> Box | None:
    """The box ``place`` boxes further on, in the first dimension that is cut; None behind the end."""
    for dim, (full, (start, stop)) in enumerate(zip(shape, box, strict=True)):
        size = stop - start
        if size < full:
            start = place * size
            return (*box[:dim], (start, min(start + size, full)), *box[dim + 1 :]) if start < full else None
    return box if place == 0 else None


def tensors_of(boxes: Boxes, place: int) -> dict[str, Tensor]:
    """As `dcp_tensors.saved` lists those of a rank of the stage, without values."""
    found: dict[str, Tensor] = {}
    for key, shape, box in boxes:
        own = moved(shape, box, place)
        if own is not None:
            values = torch.empty([stop - start for start, stop in own], device="meta")
            found[key] = DcpTensor(shape, [(own, values)], torch.float32)
        if key.startswith("weight/"):
            found[STEP + key.removeprefix("weight/")] = torch.zeros(())
    return found


class Timer:
    """Processor seconds of named parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - began


def results_of(rank: int, items: list[Any]) -> list[WriteResult]:
    return [
        WriteResult(one.index, 100, record_place(f"__{rank}_0.distcp", 100 * number, 100))
        for number, one in enumerate(items)
    ]


def by_torch(tensors: list[dict[str, Tensor]], folder: Path) -> dict[str, float]:
    """What the first rank, and every rank, does and receives in `torch.distributed.checkpoint.save`."""
    plans = []
    for rank, own in enumerate(tensors):
        planner = DefaultSavePlanner()
        planner.set_up_planner(own, None, rank == 0)
        plans.append(pickle.dumps(planner.create_local_plan()))
    timer = Timer()
    with timer.part("first"):
        whole, metadata = DefaultSavePlanner().create_global_plan([pickle.loads(plan) for plan in plans])
        for plan in whole:
            pickle.dumps(plan)  # back to its rank
    results = [pickle.dumps(results_of(rank, plan.items)) for rank, plan in enumerate(whole)]
    del whole
    with timer.part("first"):
        FileSystemWriter(folder).finish(metadata, [pickle.loads(one) for one in results])
        index = pickle.dumps(metadata)
    with timer.part("every"):
        pickle.loads(index)
    received = sum(map(len, plans)) + sum(map(len, results))
    return {**timer.seconds, "first_bytes": received, "every_bytes": len(index)}


def by_us(tensors: list[dict[str, Tensor]], folder: Path) -> dict[str, float]:
    """The same of `train.checkpoint.save`, where no rank but the first receives anything."""
    timer, parts = Timer(), []
    for rank, own in enumerate(tensors):
        with timer.part("every"):
            items = items_to_write(own, Placement(0, 1, first_of_stage=rank == 0, first=rank == 0))
            parts.append(pickle.dumps(entries(own, items, results_of(rank, items))))
    with timer.part("first"):
        write_index([pickle.loads(part) for part in parts], folder)
    timer.seconds["every"] /= len(tensors)
    return {**timer.seconds, "first_bytes": sum(map(len, parts)), "every_bytes": 0}


def reading(folder: Path) -> dict[str, float]:
    """Processor seconds and memory of a rank that reads the index."""
    timer, before = Timer(), psutil.Process().memory_info().rss
    with timer.part("read"):
        metadata = ShardReader(folder).read_metadata()
    grown = psutil.Process().memory_info().rss - before
    assert metadata.storage_data
    return {**timer.seconds, "read_memory": grown, "file": (folder / METADATA).stat().st_size}


def sample_index(folder: Path) -> dict[str, float]:
    """Processor seconds and bytes of an epoch's index, for each token of the corpus."""
    timer, prefix = Timer(), str(folder / "corpus")
    builder: Any = megatron_builder(f"{prefix}.bin", np.int32)
    builder.sequence_lengths = [DOCUMENT_TOKENS] * DOCUMENTS
    builder.document_indices = list(range(DOCUMENTS + 1))
    builder.finalize(f"{prefix}.idx")
    os.truncate(f"{prefix}.bin", 4 * DOCUMENTS * DOCUMENT_TOKENS)  # a hole: the index reads no token
    with timer.part("build"):
        arrays = build_index(prefix, np.arange(DOCUMENTS, dtype=np.int32), LENGTH, 0, True)
        publish_index(folder / "epoch", arrays)
    with timer.part("read"):
        read_index(folder / "epoch")
    tokens = DOCUMENTS * DOCUMENT_TOKENS
    seconds = {f"index_{name}": found / tokens for name, found in timer.seconds.items()}
    return {**seconds, "index_bytes": sum(one.nbytes for one in arrays) / tokens}


def in_new_process(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """Its result, from a process whose memory holds nothing of the other measurements."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure(world: int, folder: Path) -> dict[str, Any]:
    """The costs of all boxes of one pipeline stage's ranks."""
    stage_ranks = world // resolve_sizes(config_of(world).parallel, world).pp
    boxes = boxes_of(world, 2 * stage_ranks)
    tensors = [tensors_of(boxes, place) for place in range(stage_ranks)]
    boxes_here = sum(isinstance(one, DcpTensor) for own in tensors for one in own.values())
    found: dict[str, Any] = {"boxes_of_a_rank": len(boxes), "boxes": boxes_here}
    for name, save in (("torch", by_torch), ("ours", by_us)):
        (folder / name).mkdir()
        found[name] = save(tensors, folder / name)
    return found


ROWS = [  # figure, what it is, how it was found; of each number of ranks
    ("boxes", "boxes of the whole checkpoint", "counted at that size"),
    ("torch.first_seconds", "torch's save: CPU s of the first rank", "projected"),
    ("torch.first_mib", "torch's save: MiB that the first rank receives", "projected"),
    ("torch.every_seconds", "torch's save: CPU s of every rank, for an index that it does not need", "projected"),
    ("torch.every_mib", "torch's save: MiB that every rank receives", "projected"),
    ("ours.first_seconds", "this project's: CPU s of the first rank", "projected"),
    ("ours.first_mib", "this project's: MiB that the first rank receives", "projected"),
    ("ours.every_seconds", "this project's: CPU s of every rank", "timed"),
    ("file_mib", "the index, MiB", "projected"),
    ("read_seconds", "CPU s of a rank that reads the index", "projected"),
    ("read_mib", "its memory for that, MiB", "projected"),
    ("index_gib", "an epoch's sample index, GiB", "projected"),
    ("index_build_seconds", "CPU s of the first rank that builds it, once", "projected"),
    ("index_read_seconds", "CPU s of a rank that compares it with its hashes", "projected"),
]


def project(
    world: int, costs: dict[str, Any], read_costs: dict[str, float], samples: dict[str, float]
) -> dict[str, float]:
    stages = resolve_sizes(config_of(world).parallel, world).pp
    per_stage = [boxes_of(world, stage * (world // stages)) for stage in range(stages)]
    boxes = sum(number_of(shape, box) for own in per_stage for _, shape, box in own)
    scale = boxes / costs["boxes"]
    found: dict[str, float] = {"boxes": boxes}
    for name in ("torch", "ours"):
        one = costs[name]
        every = scale if name == "torch" else max(map(len, per_stage)) / costs["boxes_of_a_rank"]
        found |= {f"{name}.first_seconds": one["first"] * scale, f"{name}.every_seconds": one["every"] * every}
        found |= {f"{name}.{who}_mib": one[f"{who}_bytes"] * scale / 2**20 for who in ("first", "every")}
    found |= {"read_seconds": read_costs["read"] * scale, "read_mib": read_costs["read_memory"] * scale / 2**20}
    found["file_mib"] = read_costs["file"] * scale / 2**20
    tokens = CORPUS_TOKENS
    found["index_gib"] = samples["index_bytes"] * tokens / 2**30
    return found | {f"{name}_seconds": samples[name] * tokens for name in ("index_build", "index_read")}


def number_of(shape: tuple[int, ...], box: Box) -> int:
    """Boxes of this size that make up the tensor."""
    return math.prod(-(-full // (stop - start)) for full, (start, stop) in zip(shape, box, strict=True))


def short(value: float) -> float | int | str:
    return float(f"{value:.2g}") if value < 100 else f"{value:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file for docs/measurements")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        costs = measure(min(LAYOUTS), Path(scratch))
        read_costs = in_new_process(reading, Path(scratch) / "ours")
        samples = in_new_process(sample_index, Path(scratch))
    projected = {world: project(world, costs, read_costs, samples) for world in LAYOUTS}
    rows = [[what, how, *(short(projected[world][key]) for world in LAYOUTS)] for key, what, how in ROWS]
    columns = ["what", "how", *(f"{world:,} ranks" for world in LAYOUTS)]
    print_table("a checkpoint's index and the sample index", columns, [[str(one) for one in row] for row in rows])
    print_json("checkpoint_scale", {"costs": costs, "reading": read_costs, "samples": samples, "projected": projected})
    if options.out:
        described = {
            "name": "What a checkpoint's index and the sample index cost with the number of ranks",
            "date": time.strftime("%Y-%m-%d"),
            "machine": f"one of 2 shared cores under other load ({os.getloadavg()[0]:.0f}), no GPU",
            "command": "python -m benchmarks.checkpoint_scale",
            "commit": None,
            "columns": columns,
            "rows": rows,
            "notes": NOTES,
        }
        options.out.write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
