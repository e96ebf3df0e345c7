"""FSDP2 and HSDP on gloo ranks compute what one process computes: losses, every gradient, the norm, weights, biases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from longcat.errors import ConfigError
from longcat.names import pieces
from parallel.fsdp.sharding import local_part
from parallel.mesh import ParallelConfig, connect, resolve_sizes
from tests.support.distributed import run_ranks
from train.batches import BatchReader
from train.checkpoint.state_hash import state_hash
from train.compose import compose
from train.config import Config
from train.run import build_state
from train.state import TrainState
from train.step import Stepper

MODEL = [
    "model=debug",
    "model.hidden_size=24",
    "model.vocab_size=97",
    "model.num_experts=5",
    "model.ffn_hidden_size=20",
    "model.expert_hidden_size=12",
    "train.sequence_length=16",
    "train.global_batch_size=4",
    "train.micro_batch_size=1",
    "train.dtype=float32",
    "balance.group_loss_weight=0.01",
    "loss.hidden_z_weight=1e-3",
    "optim.grad_clip=0.5",
    "balance.ki=0.1",
    "schedule.warmup_steps=0",
]


class RandomSamples:
    """Windows of random ids that depend on the sample's number alone."""

    eod = 0

    def __getitem__(self, index: int) -> np.ndarray:
        return np.random.default_rng(index).integers(0, 97, 17)


def gather_logical(state: TrainState, grads: bool) -> dict[str, torch.Tensor]:
    """Whole logical tensors on every rank."""
    whole: dict[str, torch.Tensor] = {}
    for name, parameter in state.store.parameters:  # type: ignore[attr-defined]
        tensor = parameter.grad if grads else parameter.detach()
        assert tensor is not None
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for piece in pieces(name, tuple(full.shape)):
            whole[piece.name] = full[piece.index].clone()
    return whole


def train_three_steps(overrides: list[str]) -> dict[str, Any]:
    config: Config = compose(overrides)
    topology = connect(config.parallel)
    state = build_state(config, topology)
    initial = gather_logical(state, grads=False)
    first_hash = state_hash(state, topology)
    reader = BatchReader(RandomSamples(), config, topology)  # type: ignore[arg-type]
    stepper = Stepper(state, reader, config, topology)

    grads: dict[str, torch.Tensor] = {}
    update = stepper._update

    def keep_gradients(*arguments: Any) -> None:
        if not grads:
            grads.update(gather_logical(state, grads=True))
        update(*arguments)

    stepper._update = keep_gradients  # type: ignore[method-assign]
    results = [stepper.step() for _ in range(3)]
    torch.distributed.destroy_process_group()
    return {
        "initial": initial,
        "hash": first_hash,
        "grads": grads,
        "metrics": [result.metrics for result in results],
        "counts": [result.counts for result in results],
        "biases": state.biases,
        "held": sum(local_part(p)[0].numel() for _, p in state.store.parameters),
    }


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return run_ranks(train_three_steps, 1, MODEL)[0]


@pytest.mark.parametrize(
    "layout,world_size",
    [
        (["parallel.fsdp=2"], 2),
        (["parallel.fsdp=2", "parallel.reshard_after_forward=false"], 2),
        (["parallel.dp=2", "parallel.fsdp=1"], 2),
        (["parallel.dp=2", "parallel.fsdp=2"], 4),
    ],
    ids=["fsdp2", "fsdp2-gathered", "dp2", "dp2-fsdp2"],
)
def test_training_equals_one_process(layout: list[str], world_size: int, alone: dict[str, Any]) -> None:
    ranks = run_ranks(train_three_steps, world_size, MODEL + layout)
    for found in ranks:
        assert found["hash"] == alone["hash"], "initial weights differ in some bit"
        for name, value in alone["initial"].items():
            assert torch.equal(found["initial"][name], value), name
        assert found["grads"].keys() == alone["grads"].keys()
        for name, reference in alone["grads"].items():
            error = torch.linalg.vector_norm(found["grads"][name] - reference)
            assert error <= 2e-6 * torch.linalg.vector_norm(reference) + 1e-12, name
        for mine, theirs in zip(found["metrics"], alone["metrics"], strict=True):
            for key, value in theirs.items():
                assert mine[key] == pytest.approx(value, rel=1e-5), key
        for mine_counts, their_counts in zip(found["counts"], alone["counts"], strict=True):
            assert torch.equal(mine_counts, their_counts)
        assert torch.equal(found["biases"], alone["biases"])
    assert len({str(found["metrics"]) for found in ranks}) == 1, "ranks disagree on the metrics"


def test_each_rank_holds_only_its_shard(alone: dict[str, Any]) -> None:
    """Two FSDP ranks hold about half each; two replicas hold everything."""
    halves = [found["held"] for found in run_ranks(train_three_steps, 2, [*MODEL, "parallel.fsdp=2"])]
    assert sum(halves) == alone["held"]
    assert max(halves) < 0.6 * alone["held"]


@pytest.mark.parametrize(
    "dp,fsdp,world,expected",
    [(1, -1, 8, (1, 8)), (-1, 2, 8, (4, 2)), (2, 4, 8, (2, 4)), (1, 1, 1, (1, 1))],
)
def test_missing_mesh_sizes_are_derived(dp: int, fsdp: int, world: int, expected: tuple[int, int]) -> None:
    sizes = resolve_sizes(ParallelConfig(dp=dp, fsdp=fsdp), world)
    assert (sizes.dp, sizes.fsdp) == expected


@pytest.mark.parametrize("dp,fsdp,world", [(3, -1, 8), (2, 2, 8), (-1, -1, 8), (0, 1, 1), (1, -2, 2)])
def test_impossible_mesh_sizes_are_refused(dp: int, fsdp: int, world: int) -> None:
    with pytest.raises(ConfigError, match="parallel"):
        resolve_sizes(ParallelConfig(dp=dp, fsdp=fsdp), world)
