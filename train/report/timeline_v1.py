"""Timelines of older runs, whose events were names only: they are read into the fields of today's format."""

from __future__ import annotations

import re
from typing import Any

from parallel.watchdog.events import SpanKind

# Names began with these words
_COMPUTE = {
    "attention": SpanKind.ATTENTION,
    "dense FFN": SpanKind.DENSE_FFN,
    "norm": SpanKind.NORM,
    "router": SpanKind.ROUTER,
    "experts": SpanKind.EXPERTS,
    "embedding": SpanKind.EMBEDDING,
    "MTP": SpanKind.MTP,
    "head and loss": SpanKind.HEAD,
    "sharding": SpanKind.SHARDING,
    "weight gradients": SpanKind.WEIGHT_GRADIENTS,
    "optimizer": SpanKind.OPTIMIZER,
}
_COMMUNICATION = {
    "expert dispatch": SpanKind.EXPERT_DISPATCH,
    "expert combine": SpanKind.EXPERT_COMBINE,
    "expert counts": SpanKind.EXPERT_COUNTS,
    "expert choices": SpanKind.EXPERT_ROUTING,
    "gathered weights": SpanKind.WEIGHT_ALL_GATHER,
    "summed gradients": SpanKind.GRADIENT_REDUCE_SCATTER,
    "attention latents": SpanKind.ATTENTION_LATENTS,
    "positions of tensor-parallel ranks": SpanKind.SEQUENCE_ALL_GATHER,
    "sum over tensor-parallel ranks": SpanKind.SEQUENCE_REDUCE_SCATTER,
    "counts of the micro-batch": SpanKind.BALANCE_COUNTS,
    "largest logits": SpanKind.VOCABULARY_MAX,
    "sums over the vocabulary": SpanKind.VOCABULARY_SUM,
    "sum over all ranks": SpanKind.SUM,
    "least of all ranks": SpanKind.MINIMUM,
    "word of the first rank": SpanKind.BROADCAST,
    "words of all ranks": SpanKind.ALL_GATHER_OBJECT,
    "hidden states": SpanKind.RECEIVE_HIDDEN_STATES,
    "gradients of the embedding": SpanKind.EMBEDDING_GRADIENTS,
    "gradients of": SpanKind.RECEIVE_GRADIENTS,
}
_PHASES = {
    "forward": SpanKind.FORWARD,
    "backward": SpanKind.BACKWARD,
    "input gradients": SpanKind.INPUT_GRADIENTS,
    "weight gradients": SpanKind.WEIGHT_GRADIENTS,
}
_ACTIONS = {"F": SpanKind.FORWARD, "B": SpanKind.BACKWARD, "W": SpanKind.WEIGHT_GRADIENTS}


def is_version_1(row: dict[str, Any]) -> bool:
    """Whether a rank's part of a timeline is of the older format."""
    return "exchanges" in row


def upgrade(row: dict[str, Any]) -> dict[str, Any]:
    """A rank's part of a timeline in today's format; communication keeps its name as ``text``."""
    kept = {key: value for key, value in row.items() if key != "exchanges"}
    return kept | {
        "compute": [{**_compute(name), "start": start, "end": end} for name, start, end in row["compute"]],
        "actions": [{**_action(name), "start": start, "end": end} for name, start, end in row["actions"]],
        "communication": [_communication(one) for one in row["exchanges"]],
    }


def _communication(row: dict[str, Any]) -> dict[str, Any]:
    name = str(row["name"])
    fields = {"kind": _kind(name, _COMMUNICATION, SpanKind.UNTRACED), **_layer(name), "text": name}
    return row | fields | {"track": row["lane"], "phase": _phase(str(row["around"]))}


def _compute(name: str) -> dict[str, Any]:
    sublayer = re.search(r" (\d+), layer ", name)
    return {
        "kind": _kind(name, _COMPUTE, SpanKind.OTHER),
        "sublayer": int(sublayer[1]) if sublayer else None,
        **_layer(name),
    }


def _action(name: str) -> dict[str, Any]:
    found = re.fullmatch(r"([FBW])(\d+), layers? (\d+)(?: to (\d+))?", name)
    if found is None:
        raise ValueError(f"{name!r} is no action of a pipeline")
    layers = [int(found[3]), int(found[4] or found[3])]
    return {"kind": _ACTIONS[found[1]], "micro_batch": int(found[2]), "layers": layers}


def _phase(name: str) -> dict[str, Any] | None:
    found = re.fullmatch(r"(.+) of micro-batch (\d+)(?: in layers (\d+) to (\d+))?", name)
    if found is None or found[1] not in _PHASES:
        return None
    layers = None if found[3] is None else [int(found[3]), int(found[4])]
    return {"kind": _PHASES[found[1]], "micro_batch": int(found[2]), "layers": layers}


def _kind(name: str, kinds: dict[str, SpanKind], default: SpanKind) -> SpanKind:
    return next((kind for beginning, kind in kinds.items() if name.startswith(beginning)), default)


def _layer(name: str) -> dict[str, Any]:
    found = re.search(r", layer (\d+)$", name)
    return {"layer": int(found[1])} if found else {}
