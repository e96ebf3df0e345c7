"""Compatibility of two configurations: which keys may change on a resume and which may not."""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any

from longcat.rope import RopeScaling
from train.data.stages import TrainingStage
from train.keys.dotted import flatten
from train.stages.stored import stored_segments

# Keys that decide the results. The others (how long, where, on how many ranks, what is logged) may change.
FIXED_KEYS = (
    "model",
    "loss",
    "balance",
    "optim",
    "schedule",
    "train.seed",
    "train.sequence_length",
    "train.global_batch_size",
    "train.micro_batch_size",
    "train.elastic_bits",
    "data.weights",
    "data.stages",
    "data.validation_fraction",
    "data.mask_documents",
    "data.packing",
)

# Keys that decide the bits, beside the above: with train.elastic_bits they may not change either
BIT_KEYS = (
    "train.dtype",
    "parallel.pp",
    "parallel.cp",
    "parallel.tp",
    "parallel.ep",
    "parallel.schedule",
    "parallel.transport",
    "parallel.compile",
    "overlap.num_chunks",
)

AUTO_KEYS = ("train.dtype", "overlap.num_chunks")  # `auto` is replaced when the run has decided

CORPORA = "corpora"  # {prefix: fingerprint}, beside the configuration's sections
TOKENIZER = "tokenizer_sha256"  # of the corpora's tokenizer.json; None if unknown

# Keys that decide, with the corpora and their stages, which text a sample number is. The seed is not one: another seed
# is another order of the same windows from the same position on, which may be intended
ORDER_KEYS = ("train.sequence_length", "data.weights", "data.validation_fraction", "data.packing")

# Keys that configurations of before 28 November 2026 lack → what was computed then
ADDED = {f"model.rope_scaling.{name}": value for name, value in asdict(RopeScaling()).items()}
ADDED["train.elastic_bits"] = 0
ADDED["data.packing"] = "concatenate"


def differences(stored: dict[str, Any], wanted: dict[str, Any], keys: tuple[str, ...] = FIXED_KEYS) -> list[str]:
    """A phrase per differing leaf below ``keys``, by default also of the corpora.

    Not compared are the preset's name, and a `train.dtype` or `overlap.num_chunks` that the run has yet to decide.
    """
    old, new = (ADDED | flatten(side) for side in (stored, wanted))
    for side in (old, new):
        side["data.stages"] = given_stages(side.get("data.stages"))
    found = corpora_differences(stored, wanted) if keys == FIXED_KEYS else []
    if keys == FIXED_KEYS and old["train.elastic_bits"] and new["train.elastic_bits"]:
        keys += BIT_KEYS
    for leaf in sorted(old.keys() | new.keys()):
        watched = any(leaf == key or leaf.startswith(f"{key}.") for key in keys)
        undecided = leaf == "model.name" or (leaf in AUTO_KEYS and new.get(leaf) == "auto")
        if watched and not undecided and old.get(leaf) != new.get(leaf):
            found.append(f"{leaf} was {old.get(leaf)} and is now {new.get(leaf)}")
    return found


def refusal(origin: str, wrong: list[str]) -> str:
    """Why a run does not go on with other values than those of ``origin``, and what to do."""
    shown = "; ".join(wrong[:4]) + (f" and {len(wrong) - 4} more" if len(wrong) > 4 else "")
    return f"{origin}: {shown}; set them back to resume it, or choose another run.name"


def given_stages(stages: Any) -> Any:
    """`data.stages` without keys that have their defaults, which other versions may lack."""
    try:
        return [TrainingStage.from_mapping(stage).given() for stage in stages]
    except TypeError:
        return stages  # a config.yaml that was edited by hand


def corpora_differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """A phrase if other corpora are read, or in another order. The same corpora may be elsewhere by now.

    They are compared by fingerprint if both sides have them, else by path, however it is spelt.
    """
    paths = [_paths(side) for side in (stored, wanted)]
    prints = [[_mapping(side, CORPORA).get(path) for path in _paths(side)] for side in (stored, wanted)]
    if None in prints[0] + prints[1]:
        prints = [[os.path.realpath(path) for path in side] for side in paths]
    if prints[0] == prints[1]:
        return []
    if paths[0] != paths[1]:
        return [f"data.paths was {paths[0]} and is now {paths[1]}"]
    changed = [path for path, old, new in zip(paths[0], *prints, strict=True) if old != new]
    return [f"data.paths was {paths[0]} and is now a corpus of other contents in {', '.join(changed)}"]


def _mapping(side: dict[str, Any], key: str) -> dict[str, Any]:
    found = side.get(key)
    return found if isinstance(found, dict) else {}  # a config.yaml that was edited by hand


def _paths(side: dict[str, Any]) -> list[str]:
    found = _mapping(side, "data").get("paths")
    return [str(path) for path in found] if isinstance(found, list) else []


def order_differences(stored: dict[str, Any], wanted: dict[str, Any], position: int) -> list[str]:
    """As `differences`, of the keys that decide which text the first ``position`` samples are.

    Corpora are compared by `corpora_differences`; `data.stages` as far as they have begun.
    """
    found = [*differences(stored, wanted, ORDER_KEYS), *corpora_differences(stored, wanted)]
    begun = [
        [
            (segment.start, segment.stage.given())
            for segment in stored_segments(side)
            if segment.stage is not None and segment.start < position
        ]
        for side in (stored, wanted)
    ]
    if [stage for _, stage in begun[0]] != [stage for _, stage in begun[1]]:
        old, new = ([stage for _, stage in side] for side in begun)
        found.append(f"data.stages, as far as begun, was {old} and is now {new}")
    elif begun[0] != begun[1]:
        old, new = (side["train"]["global_batch_size"] for side in (stored, wanted))
        found.append(
            f"train.global_batch_size was {old} and is now {new}, by which a stage of data.stages that has begun would "
            f"have begun with another step"
        )
    return found
