"""Runs a layout for some steps and records what the parity tests compare, by logical name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from longcat.moe import Router
from longcat.names import Box, pieces
from parallel.memory import StateBytes, state_bytes
from parallel.mesh import Topology, make_topology, resolve_sizes, world_from_environment
from parallel.state_store import LocalBox
from tests.support.running import PaddedSamples, RandomSamples
from train.batches import BatchReader
from train.checkpoint.state_hash import state_hash
from train.compose import compose
from train.config import Config
from train.data.config import Packing
from train.run import build_state
from train.state import TrainState
from train.step import Stepper

VOCABULARY, LENGTH = 96, 32
MODEL = [
    "model=debug",
    "model.num_layers=4",
    "model.hidden_size=24",
    f"model.vocab_size={VOCABULARY}",
    "model.num_experts=8",
    "model.num_zero_experts=4",
    "model.ffn_hidden_size=24",
    "model.expert_hidden_size=12",
    "model.hidden_std=0.2",
    "model.embedding_std=0.5",
    f"train.sequence_length={LENGTH}",
    "train.global_batch_size=8",
    "train.micro_batch_size=1",
    "train.dtype=float32",
    "balance.group_loss_weight=0.01",
    "balance.num_groups=4",
    "loss.hidden_z_weight=1e-3",
    "optim.grad_clip=0.5",
    "balance.ki=0.1",
    "schedule.warmup_steps=0",
]
Piece = tuple[str, tuple[int, ...], Box, Tensor]  # logical name, shape, box, values


@dataclass
class Measured:
    """The results of one rank; `assemble` joins ranks."""

    hashes: list[str] = field(default_factory=list)
    losses: list[dict[str, float]] = field(default_factory=list)  # of each step
    grad_norms: list[dict[str, float | None]] = field(default_factory=list)  # by part of the model
    selections: list[int] = field(default_factory=list)  # a checksum of a step's selections, summed over ranks
    counts: list[Tensor] = field(default_factory=list)
    smallest_gap: float = float("inf")
    measured_bytes: StateBytes | None = None
    bytes_by_formula: StateBytes | None = None
    initial: list[Piece] = field(default_factory=list)
    first_gradients: list[Piece] = field(default_factory=list)
    last_gradients: list[Piece] = field(default_factory=list)
    weights: list[Piece] = field(default_factory=list)
    exp_avg: list[Piece] = field(default_factory=list)
    exp_avg_sq: list[Piece] = field(default_factory=list)
    biases: Tensor | None = None


def samples(config: Config) -> RandomSamples:
    """Random samples of few ids, so that many documents end; with padding where documents are packed."""
    is_packed = config.data.packing == Packing.best_fit
    return (PaddedSamples if is_packed else RandomSamples)(LENGTH, VOCABULARY // 4)


class SelectionLog:
    """Checksum of all selected (step, sample, position, layer, expert): equal sums mean equal selections."""

    def __init__(self, state: TrainState, config: Config) -> None:
        self.total, self.smallest_gap = 0, float("inf")
        self.config = config
        self.samples: list[int] = []
        self.calls: dict[int, int] = {}
        for model in state.models:
            for number, layer in model.layers.items():
                layer.mlp.router.register_forward_hook(self._hook(int(number), layer.mlp.sequence.positions(LENGTH)))

    def _hook(self, layer: int, positions: Tensor) -> Callable[[Router, Any, Any], None]:
        def hook(router: Router, _: Any, output: Any) -> None:
            if torch._C._current_graph_task_id() != -1:
                return  # recomputation in the backward
            probabilities, indices, _ = output
            call = self.calls.get(layer, 0)
            self.calls[layer] = call + 1
            size = self.config.train.micro_batch_size
            samples = torch.tensor(self.samples[call * size : (call + 1) * size])
            token = (samples[:, None] * LENGTH + positions[None, :]).flatten()
            key = (token[:, None] * 64 + layer) * 64 + indices
            self.total += int((((key * 2654435761) ^ (key >> 7)) % 1000003).sum())
            scores = (probabilities + router.e_score_correction_bias).detach().sort(1, descending=True).values
            chosen = self.config.model.top_k
            gap = (scores[:, chosen - 1] - scores[:, chosen]) / scores[:, chosen - 1].abs()
            self.smallest_gap = min(self.smallest_gap, float(gap.min()))

        return hook

    def begin(self, samples: list[int]) -> None:
        self.samples, self.calls, self.total = samples, {}, 0


def logical(local_boxes: Iterable[LocalBox]) -> list[Piece]:
    """Boxes of stored tensors, split into pieces of logical tensors."""
    found = []
    for one in local_boxes:
        for piece in pieces(one.name, one.shape, one.box):
            found.append((piece.name, piece.shape, piece.box, one.values[piece.index].clone()))
    return found


def measure(
    overrides: list[str], steps: int, full: bool = True, mutate: Callable[[Stepper], None] | None = None
) -> Measured:
    """Train ``steps`` steps in this rank's layout. A collective.

    Args:
        full: keep tensors too, not only losses and hashes.
        mutate: breaks something on purpose before the first step.
    """
    config = compose([*MODEL, *overrides])
    rank, _, world_size = world_from_environment()
    sizes = resolve_sizes(config.parallel, world_size)
    topology = make_topology(sizes, rank, world_size, torch.device("cpu"))
    state = build_state(config, topology)
    reader = BatchReader(samples(config), config, topology)  # type: ignore[arg-type]
    stepper = Stepper(state, reader, config, topology)
    log, out = SelectionLog(state, config), Measured()
    if mutate:
        mutate(stepper)
    parts = [model.part for model in state.models]
    out.bytes_by_formula = state_bytes(config.model, sizes, config.parallel.sharding, parts)
    first = state.store.counts_here
    if full and first:
        out.initial = logical(one for one in state.store.local_boxes() if one.kind == "weight")
    out.hashes.append(state_hash(state, topology))
    update = stepper._update

    def keep_gradients(*arguments: Any) -> None:
        out.measured_bytes = state.store.measured_bytes()
        if full and first and len(out.losses) in (0, steps - 1):
            gradients = logical(state.store.gradients())
            if len(out.losses) == 0:
                out.first_gradients = gradients
            out.last_gradients = gradients
        update(*arguments)

    stepper._update = keep_gradients  # type: ignore[method-assign]
    for _ in range(steps):
        log.begin(own_samples(state, reader, config, topology))
        result = stepper.step()
        assert result.healthy
        out.losses.append({key: value for key, value in result.metrics.items() if isinstance(value, float)})
        out.grad_norms.append(result.grad_norms)
        out.selections.append(log.total)
        out.counts.append(result.counts)
        out.hashes.append(state_hash(state, topology))
    out.smallest_gap = log.smallest_gap
    out.biases = state.biases
    if full and first:
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            of_kind = (one for one in state.store.local_boxes() if one.kind == kind)
            setattr(out, "weights" if kind == "weight" else kind, logical(of_kind))
    state.engine.close()
    return out


def own_samples(state: TrainState, reader: BatchReader, config: Config, topology: Topology) -> list[int]:
    """Indices of the samples that this rank reads in the next step."""
    share = config.train.global_batch_size // topology.data_ranks
    start = state.counters.samples + topology.data_rank * share
    return list(range(start, start + share))


def assemble(ranks: list[list[Piece]]) -> dict[str, Tensor]:
    """Full logical tensors from the ranks' pieces; every element must be held exactly once."""
    full: dict[str, Tensor] = {}
    times: dict[str, Tensor] = {}
    for name, shape, box, values in (piece for pieces_of_rank in ranks for piece in pieces_of_rank):
        index = tuple(slice(start, stop) for start, stop in box)
        full.setdefault(name, torch.zeros(shape, dtype=values.dtype))[index] = values
        times.setdefault(name, torch.zeros(shape, dtype=torch.int8))[index] += 1
    wrong = [name for name, count in times.items() if not bool((count == 1).all())]
    assert not wrong, f"not held exactly once: {wrong[:3]}"
    return full
