"""Which part of a model a process has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelPart:
    """A part of a model, such as a pipeline stage: layers first ... last - 1, with or without embedding and head."""

    first: int
    last: int
    embedding: bool
    head: bool  # final norm, head and MTP; MTP needs the embedding too, and gets a copy if `embedding` is false
