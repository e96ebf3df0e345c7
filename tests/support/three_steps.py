"""Three training steps of a small model on the ranks of any mesh: gradients, metrics, counts and biases."""

from __future__ import annotations

from typing import Any

import torch

from longcat.names import pieces
from parallel.fsdp.sharding import local_part
from parallel.mesh import connect
from tests.support.running import RandomSamples
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


def gather_logical(state: TrainState, grads: bool) -> dict[str, torch.Tensor]:
    """Full logical tensors, on every rank."""
    gathered: dict[str, torch.Tensor] = {}
    for name, parameter in state.store.parameters:  # type: ignore[attr-defined]
        tensor = parameter.grad if grads else parameter.detach()
        assert tensor is not None
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        for piece in pieces(name, tuple(full.shape)):
            gathered[piece.name] = full[piece.index].clone()
    return gathered


def train_three_steps(overrides: list[str]) -> dict[str, Any]:
    config: Config = compose(overrides)
    topology = connect(config.parallel)
    state = build_state(config, topology)
    initial = gather_logical(state, grads=False)
    first_hash = state_hash(state, topology)
    reader = BatchReader(RandomSamples(16), config, topology)  # type: ignore[arg-type]
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
