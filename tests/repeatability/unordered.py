"""Unordered sums to plant: each computes the sum of the function it replaces, in another order at every call.

They draw from a generator of their own, so that a test's random inputs are the same with and without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_generator = torch.Generator().manual_seed(20_261_128)


def order(count: int) -> Tensor:
    """A random order of ``count`` terms; never the natural one if there are several."""
    while True:
        drawn = torch.randperm(count, generator=_generator)
        if count < 2 or not torch.equal(drawn, torch.arange(count)):
            return drawn


def product(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.matmul`, `mm` or `bmm` whose terms are in another order."""

    def shuffled(a: Tensor, b: Tensor, **keywords: Any) -> Tensor:
        terms = order(a.shape[-1])
        return original(a[..., terms], b[..., terms, :], **keywords)

    return shuffled


def bags(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`embedding_bag` whose rows are in another order inside each bag."""

    def shuffled(index: Tensor, rows: Tensor, first: Tensor, mode: str) -> Tensor:
        bag = torch.bucketize(torch.arange(index.shape[0]), first, right=True)
        key = bag + torch.rand(index.shape[0], generator=_generator, dtype=torch.float64) * 0.999
        return original(index[key.argsort()], rows, first, mode=mode)

    return shuffled


def sparse_rows(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The sparse product of rows whose terms are in another order inside each row."""

    def shuffled(sparse: Tensor, rows: Tensor) -> Tensor:
        starts, columns, values = sparse.crow_indices(), sparse.col_indices(), sparse.values()
        row = torch.bucketize(torch.arange(columns.shape[0]), starts[1:], right=True)
        key = row + torch.rand(columns.shape[0], generator=_generator, dtype=torch.float64) * 0.999
        terms = key.argsort()
        return original(torch.sparse_csr_tensor(starts, columns[terms], values[terms], sparse.shape), rows)

    return shuffled


def columns(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A sum over columns whose columns are in another order."""

    def shuffled(values: Tensor, *rest: Any) -> Tensor:
        return original(values[:, order(values.shape[1])], *rest)

    return shuffled


def rows_sum(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`Tensor.sum` whose rows are in another order, for sums over the first dimension."""

    def shuffled(values: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        if values.is_floating_point() and arguments[:1] in ((), (0,)) and values.ndim:
            values = values[order(values.shape[0])]
        return original(values, *arguments, **keywords)

    return shuffled


def blocks(original: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """A generator of blocks that come in another order, the same for one forward and one backward."""

    def shuffled(*arguments: Any) -> Iterator[Any]:
        given = list(original(*arguments))
        return iter([given[number] for number in order(len(given))])

    return shuffled
