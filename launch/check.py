"""`longcat check`: what a configuration would train, whether it fits and its data are there; nothing is trained."""

from __future__ import annotations

from pathlib import Path

from launch.local import num_processes, num_ranks
from longcat.counts import describe, flops_row, human
from parallel.memory import in_a_step, mib, state_bytes
from parallel.sizes import resolve_sizes
from train.check import batch_shape, check_sizes
from train.config import Config
from train.data.corpus import read_info
from train.data.ids import check_ids, unused_ids
from train.run_dir.folder import check_not_another_run
from train.samples import find_padding, size_rows


def check(config: Config) -> list[tuple[str, str]]:
    """(name, value) rows of model, layout, memory and data. Writes nothing.

    Raises:
        ConfigError: the run would be refused: sizes, layout, memory, corpora or run folder do not fit.
    """
    ranks, train = num_ranks(config), config.train
    needed, has = check_sizes(config, ranks, num_processes(config))
    sizes = resolve_sizes(config.parallel, ranks)
    state = state_bytes(config.model, sizes, config.parallel.sharding, [None])
    micro_batches = batch_shape(config, sizes).num_micro_batches
    step = in_a_step(config.model, sizes, config.parallel, [None], micro_batches, train.dtype)
    check_ids(config.data.paths, config.model.vocab_size, folders=[])
    padding = find_padding(config)
    axes = ", ".join(f"{name} {size}" for name, size in vars(sizes).items() if size > 1) or "one of each axis"
    rows = [
        ("model", config.model.name),
        *describe(config.model),
        flops_row(config.model, train.sequence_length, config.data.mask_documents),
        *size_rows(config, padding),
        ("ranks", f"{ranks} ({axes})"),
        ("memory per rank", f"{state}, by formula" + (", before stages are divided" if sizes.pp > 1 else "")),
        *([("in a step", step)] if step else []),
        ("memory needed", f"at least {mib(needed)} of {mib(has)}; activations inside a layer come on top"),
    ]
    rows += [("data", describe_corpus(prefix)) for prefix in config.data.paths]
    if (unused := unused_ids(config.data.paths, config.model.vocab_size)) is not None:
        rows.append(("vocabulary", unused))
    check_not_another_run(config)
    return [*rows, ("run folder", f"{config.run.folder} ({'exists' if config.run.folder.exists() else 'new'})")]


def describe_corpus(prefix: str) -> str:
    """One line on a corpus that has been checked."""
    info = read_info(prefix)
    if info is None:
        return f"{prefix}: {mib(Path(f'{prefix}.bin').stat().st_size)}, no corpus.json"
    return f"{prefix}: {human(info.tokens)} tokens of {human(info.documents)} documents, vocabulary {info.vocab_size}"
