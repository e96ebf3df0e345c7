"""What `parallel/` replaces in a model: positions of a sequence, vocabulary, dispatcher, store of weight gradients.

Each is a small interface; its one-process version is the default. A module that uses one inherits the class that holds
it (`SequenceModule`, ...), and `install` sets it in a whole model. The model never asks where it runs. The dispatcher's
interface is in `dispatch.py`.
"""

# B sequences, S all positions, q positions of local queries, s local positions of the residual stream, D width,
# V vocabulary

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longcat.dispatch import Dispatcher
from longcat.ops.cross_entropy import linear_cross_entropy
from longcat.ops.embedding import embedding


class SequenceSharding(Protocol):
    """How the positions of a micro-batch are sharded over ranks.

    Three sets of positions nest: each rank has the residual stream of s of them, computes the queries of q, and needs
    the keys of all S. In one process all three are the same.
    """

    num_shards: int  # ranks that share the tokens of a micro-batch

    def ranges(self, length: int) -> list[tuple[int, int]]:
        """(start, stop) of the q positions in the sequence of ``length``, in the order of the local queries."""

    def positions(self, length: int) -> Tensor:
        """The s positions of the residual stream in the sequence of ``length``, int64 on the CPU."""

    def select(self, values: Tensor) -> Tensor:
        """Values of all positions [B, S, ...] → of the q positions."""

    def gather(self, x: Tensor) -> Tensor:
        """x [B, s, D] → [B, q, D]; the backward sums the gradients of the ranks that share the positions."""

    def reduce(self, partial: Tensor) -> Tensor:
        """Partial results [B, q, D] of the ranks that share the positions → their sum at the s local positions."""

    def start_keys(self, latents: Tensor) -> Any:
        """Start sending latents [B, s, R] to every rank that computes queries of the micro-batch → handle."""

    def wait_keys(self, handle: Any) -> Tensor:
        """→ latents [B, S, R] in the order of positions; the backward sums over ranks."""

    def start_count(self, counts: Tensor) -> Any:
        """Start summing integers over the ranks that share the micro-batch → handle."""

    def wait_count(self, handle: Any) -> Tensor:
        """→ the sums."""


class UnshardedSequence:
    """Every position is local."""

    num_shards = 1

    def ranges(self, length: int) -> list[tuple[int, int]]:
        return [(0, length)]

    def positions(self, length: int) -> Tensor:
        return torch.arange(length)

    def select(self, values: Tensor) -> Tensor:
        return values

    def gather(self, x: Tensor) -> Tensor:
        return x

    def reduce(self, partial: Tensor) -> Tensor:
        return partial

    def start_keys(self, latents: Tensor) -> Any:
        return latents

    def wait_keys(self, handle: Any) -> Tensor:
        return handle

    def start_count(self, counts: Tensor) -> Any:
        return counts

    def wait_count(self, handle: Any) -> Tensor:
        return handle


class VocabularySharding(Protocol):
    """Look-up and cross-entropy over a vocabulary whose rows may be sharded over ranks."""

    def lookup(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """Token ids [...] → this rank's partial rows [..., D]; the sum over ranks is the embedding."""

    def cross_entropy(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, valid: Tensor, run_again: bool = False
    ) -> tuple[Tensor, Tensor]:
        """As `linear_cross_entropy`, with ``weight`` the local rows; the result is the same on every rank."""


class UnshardedVocabulary:
    """Every row is local."""

    def lookup(self, tokens: Tensor, weight: Tensor) -> Tensor:
        return embedding(tokens, weight)

    def cross_entropy(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, valid: Tensor, run_again: bool = False
    ) -> tuple[Tensor, Tensor]:
        return linear_cross_entropy(hidden, weight, labels, valid, run_again=run_again)


class WeightGradStore(Protocol):
    """Stores weight gradients that a backward defers, so that a pipeline computes them later (as in DualPipe)."""

    def put(self, module: nn.Module, name: str, compute: Callable[[], Tensor]) -> None:
        """Later add ``compute()`` to the gradient of ``module``'s parameter ``name``.

        By name, because under recomputation the tensor that was multiplied is not the parameter.
        """


def local_tensor(weight: Tensor) -> Tensor:
    """The local part of a weight: all of it, unless `parallel/` has sharded it."""
    to_local = getattr(weight, "to_local", None)
    return weight if to_local is None else to_local()


UNSHARDED_SEQUENCE = UnshardedSequence()
UNSHARDED_VOCABULARY = UnshardedVocabulary()


class SequenceModule(nn.Module):
    """A module that works on a rank's share of the positions."""

    sequence: SequenceSharding = UNSHARDED_SEQUENCE


class VocabularyModule(nn.Module):
    """A module that uses the embedding or the head."""

    vocabulary: VocabularySharding = UNSHARDED_VOCABULARY


class WeightGradModule(nn.Module):
    """A module whose weight gradients can be deferred. None: the backward computes them at once."""

    weight_grad_store: WeightGradStore | None = None


class DispatcherModule(nn.Module):
    """A module that sends tokens to their experts."""

    dispatcher: Dispatcher


def install(
    model: nn.Module,
    *,
    sequence: Callable[[str], SequenceSharding] | None = None,
    vocabulary: Callable[[str], VocabularySharding] | None = None,
    dispatcher: Callable[[str], Dispatcher] | None = None,
    weight_grad_store: Callable[[str], WeightGradStore] | None = None,
) -> None:
    """Set the given objects in every module of ``model`` that uses them, in place.

    Each argument maps the module's name to the object.
    """
    for name, module in model.named_modules():
        if sequence is not None and isinstance(module, SequenceModule):
            module.sequence = sequence(name)
        if vocabulary is not None and isinstance(module, VocabularyModule):
            module.vocabulary = vocabulary(name)
        if dispatcher is not None and isinstance(module, DispatcherModule):
            module.dispatcher = dispatcher(name)
        if weight_grad_store is not None and isinstance(module, WeightGradModule):
            module.weight_grad_store = weight_grad_store(name)
