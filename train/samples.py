"""A run's samples: where their indexes are, how they are opened, and how much of them is padding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from longcat.counts import human
from train.config import Config
from train.data.config import Packing
from train.stages.configs import list_stages

if TYPE_CHECKING:  # a wrong configuration is answered without torch
    from train.data.samples import TokenSamples


def index_folders(config: Config) -> list[Path]:
    """Where the sample indexes may be, first choice first."""
    if config.data.cache_dir:
        return [Path(config.data.cache_dir)]
    return [Path(config.data.paths[0]).parent / "index", config.run.folder / "index"]


def open_samples(config: Config, split: Literal["train", "validation"], writes: bool = True) -> TokenSamples:
    """The samples of a split. The first rank to need an index writes it for the others, unless ``writes`` is False.

    Raises:
        ConfigError: a corpus is missing, damaged, too small where it has a share, or does not fit the vocabulary.
    """
    from train.data.samples import TokenSamples

    folders = index_folders(config)
    return TokenSamples(
        config.data,
        sequence_length=config.train.sequence_length,
        seed=config.train.seed,
        vocab_size=config.model.vocab_size,
        split=split,
        cache_dir=folders[0],
        fallback_dir=folders[-1],
        global_batch_size=config.train.global_batch_size,
        writes=writes,
    )


@dataclass(frozen=True)
class PaddingShare:
    """Padding of packed samples (`data.packing=best_fit`): it is computed, and counts as no tokens and no FLOPs."""

    share: float = 0.0  # of the positions
    source: str = ""  # where the share is from, for people; empty without packing
    num_samples: int = 0  # of one epoch of every corpus, where they were counted


def find_padding(config: Config, stage: int = 0) -> PaddingShare:
    """The padding in stage ``stage`` of `data.stages` (0 = before the first). Writes nothing.

    None is assumed where a corpus is not on this machine.

    Raises:
        ConfigError: the corpora are here, and a run would refuse them.
    """
    if config.data.packing != Packing.best_fit:
        return PaddingShare()
    missing = [prefix for prefix in config.data.paths if not Path(f"{prefix}.idx").exists()]
    if missing:
        return PaddingShare(source=f"none assumed: {missing[0]} is not here")
    return padding_of(open_samples(config, "train", writes=False), stage)


def padding_of(samples: TokenSamples, stage: int = 0) -> PaddingShare:
    """The padding of samples that are open; see `find_padding`."""
    if not samples.is_packed:
        return PaddingShare()
    count, share = samples.padding(stage)
    return PaddingShare(share, f"{share:.2%} of the positions, by the sample index", count)


def size_rows(config: Config, padding: PaddingShare) -> list[tuple[str, str]]:
    """Rows (name, value) for people: batch, steps, what of it is padding, and stages."""
    train = config.train
    tokens = train.global_batch_size * train.sequence_length
    rows = [
        ("batch", f"{train.global_batch_size} × {train.sequence_length} = {human(tokens)} tokens per step"),
        ("steps", f"{train.steps}, {human(train.steps * tokens)} tokens"),
    ]
    if padding.source:
        rows.append(("padding", padding.source))
    if padding.num_samples and not config.data.stages:
        text, samples = train.steps * tokens * (1 - padding.share), train.steps * train.global_batch_size
        epochs = samples / padding.num_samples
        rows.append(("text", f"{human(text)} tokens; {epochs:.3g} epochs of {padding.num_samples:,} samples"))
    return [*rows, *list_stages(config)]
