"""A training with `train.elastic_bits` on the ranks of any layout: every value of its metrics, and the state hash."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import parallel.fsdp.collectives as fsdp_collectives
from parallel import elastic
from parallel.collectives import point_to_point
from parallel.mesh import make_topology, resolve_sizes, world_from_environment
from parallel.state_store import ShardedAdamW
from tests.support.running import PaddedSamples, RandomSamples
from tests.support.three_steps import MODEL
from train.batches import BatchReader
from train.check import check_sizes
from train.checkpoint.load import load
from train.checkpoint.save import save
from train.checkpoint.state_hash import state_hash
from train.compose import compose
from train.data.config import Packing
from train.run import build_state
from train.run_dir.folder import as_mapping
from train.step import Stepper
from train.validation import Validator

WORDS = [
    *MODEL,
    "model.num_experts=6",
    "model.vocab_size=98",
    "model.ffn_hidden_size=22",
    "train.global_batch_size=8",
    "train.elastic_bits=4",
    "validation.batches=1",
]
Values = dict[str, Any]  # of a step


def train(words: list[str], steps: int, without: str = "", start: str = "", folder: str = "") -> list[Values]:
    """The values of each step, up to step ``steps``.

    ``start`` is a checkpoint to continue from; at the end one is written to ``folder``. ``without`` names a cure that
    is left out, one of `CURES`.
    """
    with CURES[without]() if without else patch.dict({}):
        config = compose([*WORDS, *words])
        rank, _, world_size = world_from_environment()
        check_sizes(config, world_size)
        topology = make_topology(resolve_sizes(config.parallel, world_size), rank, world_size, torch.device("cpu"))
        state = build_state(config, topology)
        if start:
            load(state, Path(start), as_mapping(config))
        is_packed = config.data.packing == Packing.best_fit
        samples: Any = (PaddedSamples if is_packed else RandomSamples)(config.train.sequence_length)
        stepper = Stepper(state, BatchReader(samples, config, topology), config, topology)
        found = []
        while state.counters.step < steps:
            result = stepper.step()
            assert result.healthy
            found.append({**result.metrics, **result.grad_norms, "state_hash": state_hash(state, topology)})
        with patch("train.validation.tokenizer_path", lambda _: None):
            found[-1]["val_loss"] = Validator(samples, config, topology).measure(state).loss
        if folder:
            save(state, Path(folder), as_mapping(config), topology)
        state.engine.close()
        return found


def _consecutive(virtual: elastic.VirtualRanks, data_rank: int, total: int) -> list[int]:
    share = total // virtual.data_ranks
    return list(range(data_rank * share, (data_rank + 1) * share))


def _in_order(terms: list[torch.Tensor], branches: int) -> torch.Tensor:
    for term in terms[1:]:
        terms[0].add_(term)
    return terms[0]


# What `train.elastic_bits` does → the plain way in its place
CURES: dict[str, Callable[[], Any]] = {
    "tree of sums": lambda: patch.object(point_to_point, "tree_sum", _in_order),
    "tree over replicas": lambda: patch.object(fsdp_collectives, "tree_sum", _in_order),
    "exact norm": lambda: patch.object(elastic.ElasticAdamW, "gradient_squares", ShardedAdamW.gradient_squares),
    "whole vectors": lambda: patch.object(elastic.ElasticAdamW, "step", ShardedAdamW.step),
    "dealing by groups": lambda: patch.object(elastic.VirtualRanks, "micro_batches", _consecutive),
}
