"""Nested mappings and the dotted keys of their leaves: `optim.lr`."""

from __future__ import annotations

from typing import Any


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings → {dotted key: leaf}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def value_at(tree: object, key: str, otherwise: object = None) -> object:
    """The value at a dotted key; ``otherwise`` where there is none, or None."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return otherwise if tree is None else tree
