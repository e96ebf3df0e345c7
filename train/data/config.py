"""The `data` group of the configuration: what a corpus is built from and what training reads."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from longcat.config_choices import check_choice
from longcat.errors import ConfigError
from train.data.stages import TrainingStage, check_stage

PYTHON_SOURCE = "python_source"
TOKENIZER_NAME = "tokenizer.json"


def tokenizer_file(path: str) -> str:
    """The tokenizer.json that ``path`` names: itself, or the one in that folder."""
    return os.path.join(path, TOKENIZER_NAME) if path and os.path.isdir(path) else path


class Packing(StrEnum):
    """How documents become samples."""

    concatenate = "concatenate"
    best_fit = "best_fit"


@dataclass
class DataConfig:
    """What `longcat data build` reads (`source` to `overwrite`) and what training reads (`paths` to `from_start`).

    `data=NAME` chooses a file of configs/data.
    """

    name: str  # name of the choice; the default of `out` follows it
    # python_source, manual_pages or changelogs (text of this machine), a hub id, a folder, a file or a glob
    source: str
    out: str = ""  # folder that the corpus is written to
    tokenizer: str | None = None  # a tokenizer.json, or a folder that holds one, to use; null = train one
    # the token that ends a document, as the tokenizer spells it; null = what the files beside the tokenizer.json say
    # (tokenizer_config.json, special_tokens_map.json, generation_config.json, config.json), else a usual name
    eos_token: str | None = None
    text_field: str = "text"  # field (column) that holds the text
    split: str = "train"  # split of a hub data set; a slice such as train[:10%], also of files, needs streaming=false
    subset: str | None = None  # subset (configuration name) of a hub data set
    streaming: bool = True  # stream a hub data set instead of downloading it first
    max_bytes: int = 0  # bytes of UTF-8 text to take; 0 = all
    tokenizer_bytes: int = 6_000_000  # bytes of text to train the tokenizer on; 0 = all
    overwrite: bool = False  # replace a corpus in `out` that was built with other settings
    paths: list[str] = field(default_factory=list)  # prefixes of the .bin/.idx pairs to train on, in Megatron's format
    # folder of the sample indexes, which runs share; empty = `index` beside the first corpus, or in the run folder if
    # that cannot be written
    cache_dir: str = ""
    # share of each corpus in `paths`; empty = in proportion to their tokens
    weights: list[float] = field(default_factory=list)
    # later stages: a list of {start_tokens, and what changes: weights, ramp_tokens, sequence_length, rope_theta,
    # rope_scaling, mtp_weight} (train/data/stages.py); tokens count from the data's first sample
    stages: list[TrainingStage] = field(default_factory=list)
    validation_fraction: float = 0.02  # share of the documents held out for validation
    mask_documents: bool = False  # attention and MTP stay inside a document, as the .idx bounds it
    # concatenate: one document after the other, cut into samples anywhere; best_fit: a document that fits a sample is
    # never cut, what is left of a sample is padding, and no label crosses documents (needs mask_documents)
    packing: Packing = Packing.concatenate
    from_start: bool = False  # a run that starts from another run's checkpoint reads its data from the first sample

    def __post_init__(self) -> None:
        if not self.out:
            self.out = f"data/{self.name}"
        # a shell expands ~ only at the start of a word
        self.out, self.cache_dir = os.path.expanduser(self.out), os.path.expanduser(self.cache_dir)
        self.paths = [os.path.expanduser(path) for path in self.paths]
        if self.tokenizer is not None:
            self.tokenizer = tokenizer_file(os.path.expanduser(self.tokenizer))
        if not self.paths:
            self.paths = [str(Path(self.out) / "corpus")]

    def validate(self) -> None:
        """Check what can be checked without opening a file.

        Raises:
            ConfigError: a field is out of its range; the message names the key.
        """
        for key in ("name", "source", "text_field", "split"):
            if not getattr(self, key).strip():
                raise ConfigError(f"data.{key} is empty; give it a value")
        for key in ("tokenizer", "eos_token"):
            if getattr(self, key) == "":
                raise ConfigError(f"data.{key} is empty; give it a value, or null")
        for key in ("max_bytes", "tokenizer_bytes"):
            if getattr(self, key) < 0:
                raise ConfigError(f"data.{key}={getattr(self, key)} is negative; use 0 for no limit")
        if not 0.0 < self.validation_fraction < 1.0:
            raise ConfigError(
                f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1, such as 0.02"
            )
        check_choice("data.packing", self.packing, Packing)
        if self.packing == Packing.best_fit and not self.mask_documents:
            raise ConfigError(
                f"data.packing={self.packing} packs documents that have nothing to do with each other into a sample; "
                f"set data.mask_documents=true, so that attention stays inside each"
            )
        if any(not path.strip() for path in self.paths):
            raise ConfigError(
                "data.paths holds an empty prefix; each is the path of a .bin/.idx pair without the suffix"
            )
        if self.weights:
            self._check_weights("data.weights", self.weights)
        self._check_stages()

    def _check_weights(self, key: str, weights: list[float]) -> None:
        if len(weights) != len(self.paths):
            raise ConfigError(
                f"{key} has {len(weights)} entries for {len(self.paths)} corpora in data.paths; give one for each"
            )
        if any(not math.isfinite(weight) or weight < 0 for weight in weights):
            raise ConfigError(f"{key}={list(weights)} must be finite and not negative")
        if sum(weights) == 0:
            raise ConfigError(f"{key}={list(weights)} are all zero; at least one corpus needs a positive weight")

    def _check_stages(self) -> None:
        previous = 0
        for number, stage in enumerate(self.stages):
            if stage.start_tokens <= previous:
                raise ConfigError(
                    f"data.stages[{number}].start_tokens={stage.start_tokens} must be larger than "
                    f"{previous}, where the"
                    " stage before it starts; before the first stage data.weights hold"
                )
            check_stage(f"data.stages[{number}]", stage)
            if stage.weights:
                self._check_weights(f"data.stages[{number}].weights", stage.weights)
            previous = stage.start_tokens
