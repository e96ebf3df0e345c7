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

CORPORA = "corpora"  # {prefix: fingerprint}, beside the configuration's sections
TOKENIZER = "tokenizer_sha256"  # of the tokenizer.json that made the corpora, or None where that is not known

# What decides, beside the corpora and their stages, which text a sample's number stands for. Another seed is another
# order of the same windows from the same position on, which may be wanted
ORDER = ("train.sequence_length", "data.weights", "data.validation_fraction")


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


def order_differences(stored: dict[str, Any], wanted: dict[str, Any], position: int) -> list[str]:
    """As `differences`, of what decides which text the first ``position`` samples are.

    Corpora are compared by their fingerprints where both sides have them, else by their paths. Of `data.stages` those
    count that have begun.
    """
    paths = [context["data"]["paths"] for context in (stored, wanted)]
    prints = [[context.get(CORPORA, {}).get(path) for path in context["data"]["paths"]] for context in (stored, wanted)]
    found = differences(stored, wanted, ORDER)
    if None in prints[0] + prints[1]:
        prints = paths
    if prints[0] != prints[1]:
        here = "a corpus of other contents" if paths[0] == paths[1] else paths[1]
        found.append(f"data.paths is {paths[0]} there and {here} here")
    length = stored["train"]["sequence_length"]
    begun = [
        [stage for stage in context["data"]["stages"] if -(-stage["start_tokens"] // length) < position]
        for context in (stored, wanted)
    ]
    if begun[0] != begun[1]:
        found.append(f"data.stages, as far as begun, is {begun[0]} there and {begun[1]} here")
    return found
