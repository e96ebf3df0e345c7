"""Whether two configurations are the same run: what may change on a resume and what may not."""

from __future__ import annotations

from typing import Any

# What decides the numbers. The rest (how long, where, on how many ranks, what is written down) may change.
IDENTITY = (
    "model",
    "loss",
    "balance",
    "optim",
    "schedule",
    "train.seed",
    "train.sequence_length",
    "train.global_batch_size",
    "train.micro_batch_size",
    "data.paths",
    "data.weights",
    "data.stages",
    "data.validation_fraction",
    "data.mask_documents",
    "corpora",
)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings → {dotted key: leaf}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def differences(stored: dict[str, Any], wanted: dict[str, Any], keys: tuple[str, ...] = IDENTITY) -> list[str]:
    """`key: stored → wanted` for each differing leaf below ``keys``; the preset's name alone makes no difference."""
    old, new = flatten(stored), flatten(wanted)
    found = []
    for leaf in sorted(old.keys() | new.keys()):
        watched = any(leaf == key or leaf.startswith(f"{key}.") for key in keys)
        if watched and leaf != "model.name" and old.get(leaf) != new.get(leaf):
            found.append(f"{leaf} is {old.get(leaf)} there and {new.get(leaf)} here")
    return found
