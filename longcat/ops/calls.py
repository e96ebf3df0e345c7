"""Calls of operators as an observer sees them: which one, in which module, with which operands.

An operator is an autograd function that is marked `observed`, or a function of tensors with a name from `named`. Both
are pure: an observer may run them again and compare (`parallel/sdc/recompute.py`). Without an observer the cost is one
comparison with None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar, cast

import torch

F = TypeVar("F", bound=type[torch.autograd.Function])
R = TypeVar("R")

FUNCTIONS: dict[str, Callable[..., Any]] = {}  # by name, as a saved call names them


class Observer(Protocol):
    """Runs the calls; returns what they return."""

    def forward(self, name: str, plain: Callable[..., Any], ctx: Any, args: tuple[Any, ...]) -> Any:
        """Run an autograd function's forward."""

    def backward(self, name: str, plain: Callable[..., Any], ctx: Any, grads: tuple[Any, ...]) -> Any:
        """Run an autograd function's backward."""

    def call(self, name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Run a function of tensors."""


_observer: Observer | None = None


def set_observer(observer: Observer | None) -> None:
    """Let ``observer`` run the operators from now on; None ends that."""
    global _observer
    _observer = observer


def is_observed() -> bool:
    """Whether calls may run again: they then change no operand."""
    return _observer is not None


@contextmanager
def unobserved() -> Iterator[None]:
    """Operators that are called meanwhile, by an observer that runs one again, are not observed."""
    observer = _observer
    set_observer(None)
    try:
        yield
    finally:
        set_observer(observer)


def observed(name: str) -> Callable[[F], F]:
    """Mark an autograd function whose forward and backward change nothing but their context."""

    def mark(function: F) -> F:
        plain_forward, plain_backward = function.forward, function.backward

        def forward(ctx: Any, *args: Any) -> Any:
            if _observer is None:
                return plain_forward(ctx, *args)
            return _observer.forward(name, plain_forward, ctx, args)

        def backward(ctx: Any, *grads: Any) -> Any:
            if _observer is None:
                return plain_backward(ctx, *grads)
            return _observer.backward(name, plain_backward, ctx, grads)

        function.forward, function.backward = staticmethod(forward), staticmethod(backward)  # type: ignore[assignment]
        FUNCTIONS[f"{name}, forward"], FUNCTIONS[f"{name}, backward"] = plain_forward, plain_backward
        return function

    return mark


def named(name: str, function: Callable[..., R]) -> Callable[..., R]:
    """A pure function of tensors as an operator of its own."""
    FUNCTIONS[name] = function

    def run(*args: Any) -> R:
        return function(*args) if _observer is None else cast(R, _observer.call(name, function, args))

    return run
