"""Common silent bugs of parallel training, made on purpose: the parity tests must detect each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from longcat.moe import MoE
from parallel.state_store import ShardedAdamW
from train.step import Stepper


def double_one_expert(stepper: Stepper) -> None:
    """One expert's gradient counts twice on its rank."""
    run = stepper.state.engine.run

    def mutated(*arguments: Any) -> Any:
        found = run(*arguments)
        for shard in stepper.state.store.gradients():
            if shard.name == "layers.1.mlp.experts.down" and dist.get_rank() == 0:
                shard.values[0] *= 2
        return found

    stepper.state.engine.run = mutated  # type: ignore[method-assign]


def drop_a_shard_from_the_norm(stepper: Stepper) -> None:
    """The last rank omits the shards of one layer from the gradient norm."""
    store = stepper.state.store
    assert isinstance(store, ShardedAdamW)
    gradients = store.gradients
    if dist.get_rank() == dist.get_world_size() - 1:
        store.gradients = lambda: (one for one in gradients() if "layers.2" not in one.name)  # type: ignore[method-assign]


def count_a_chunk_twice(stepper: Stepper) -> None:
    """The selections of a micro-batch's first half are counted again, as a recomputed chunk would be."""
    for _, layer in layers(stepper):
        layer.mlp.dispatch = _with_counts_of_half(layer.mlp)


def _with_counts_of_half(moe: MoE) -> Callable[[Any], Any]:
    plain = moe.dispatch

    def dispatch(u: Any, *others: Any) -> Any:
        pending = plain(u, *others)
        first = pending.indices[: len(u) // 2].flatten()
        pending.counts.scatter_add_(0, first, first.new_ones(len(first)))
        return pending

    return dispatch


def read_the_mesh_in_the_balance_loss(stepper: Stepper) -> None:
    """The number of groups is the expert-parallel size, whatever `balance.num_groups` says."""
    for _, layer in layers(stepper):
        layer.mlp.balance_groups = stepper.topology.sizes.ep


def normalise_by_rank(stepper: Stepper) -> None:
    """Each rank divides by its own valid tokens instead of the global batch's."""
    divisors = stepper.reader.divisors

    def mutated(batches: Any) -> Any:
        of_batch = divisors(batches)
        own = sum(int(batch.valid.sum()) for batch in batches)
        return type(of_batch)(own, of_batch.mtp_tokens, of_batch.tokens, of_batch.micro_batches)

    stepper.reader.divisors = mutated  # type: ignore[method-assign]


def count_replicas_in_the_norm(stepper: Stepper) -> None:
    """The norm counts shards that several replicas hold as if they were different."""
    store = stepper.state.store
    plain = store.gradient_squares

    def mutated() -> Any:
        squares = [shard.values.double().square().sum() for shard in store.gradients()]
        return torch.stack([sum(squares), *plain()[1:]])

    store.gradient_squares = mutated  # type: ignore[method-assign]


def layers(stepper: Stepper) -> list[tuple[str, Any]]:
    return [pair for model in stepper.state.models for pair in model.layers.items()]


MUTATIONS: dict[str, Callable[[Stepper], None]] = {
    function.__name__: function
    for function in (
        double_one_expert,
        drop_a_shard_from_the_norm,
        count_a_chunk_twice,
        read_the_mesh_in_the_balance_loss,
        normalise_by_rank,
        count_replicas_in_the_norm,
    )
}
