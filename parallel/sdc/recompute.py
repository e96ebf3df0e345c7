"""Runs one operator call of a step a second time, from permuted operands, and compares the results bit by bit.

The call rotates: check n takes call n modulo the number of calls in a step, so without a pipeline all ranks repeat the
same call of the same layer at once. A call that differs is computed twice more, plainly and permuted, to tell a
transient fault from a lasting one, and saved with its operands as a bundle for `longcat replay`.

Calls are pure (`longcat/ops/calls.py`). Collectives are no operators, so a rank repeats a call without its peers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from longcat.ops.calls import set_observer, unobserved
from longcat.ops.permuted import permuting
from parallel.sdc.values import encoded, ignore

_HOOKS: WeakKeyDictionary[nn.Module, list[RemovableHandle]] = WeakKeyDictionary()  # that name a model's calls


class Persistence(StrEnum):
    """What repeating a call says about a fault."""

    transient = "transient"  # the call gives the permuted run's result when it is repeated
    lasting = "lasting"  # plain runs agree with each other, permuted ones too, but not with the plain ones
    unstable = "unstable"  # repeated calls differ from each other


@dataclass(frozen=True)
class SavedCall:
    """A call that can be repeated elsewhere: copies, since FSDP2 frees gathered weights."""

    function: str  # its name in `longcat.ops.calls.FUNCTIONS`
    args: Any  # these are `encoded`
    context: Any  # what autograd's context held; None for a function of tensors
    first: Any  # the results with which training went on
    permuted: Any

    @classmethod
    def of(
        cls,
        function: str,
        args: tuple[Any, ...],
        context: dict[str, Any] | None,
        first: list[Tensor | None],
        permuted: list[Tensor | None],
    ) -> SavedCall:
        """Copy what a call holds."""
        return cls(function, *map(encoded, (args, context, first, permuted)))


@dataclass(frozen=True)
class Difference:
    """A call whose permuted repetition gave other bits."""

    operator: str  # name and direction
    module: str  # the module in which the call was made; empty outside the layers
    persistence: Persistence
    elements: int  # that differ
    largest: float  # absolute difference
    call: SavedCall

    def __str__(self) -> str:
        where = f" in {self.module}" if self.module else ""
        return f"{self.operator}{where}"


class Scratch:
    """Stands in for autograd's context while a call is repeated."""

    def __init__(self, **held: Any) -> None:
        self.saved_tensors: tuple[Any, ...] = ()
        self.__dict__.update(held)

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Any) -> None:
        pass


@dataclass
class Recomputer:
    """An `longcat.ops.calls.Observer` that repeats one call of each step in which a check is due."""

    every: int  # steps between checks; 0 = never
    differences: list[Difference] = field(default_factory=list)  # found since `take`
    checked: int = 0  # calls repeated so far
    module: str = ""  # the module whose forward runs
    _count: int = 0  # calls in this step so far
    _total: int = 0  # calls in the last step
    _target: int = -1  # the number of the call to repeat

    def install(self, models: list[nn.Module]) -> None:
        """Learn in which module of ``models`` a call is made, if checks are wanted."""
        for model in models:
            for handle in _HOOKS.pop(model, ()):
                handle.remove()  # of a recomputer before
            if not self.every:
                continue
            _HOOKS[model] = [
                handle
                for name, module in model.named_modules()
                for handle in (
                    module.register_forward_pre_hook(self._naming(name)),
                    module.register_forward_hook(self._naming(name.rpartition(".")[0])),
                )
            ]

    def _naming(self, name: str) -> Callable[..., None]:
        def enter(*_: Any) -> None:
            self.module = name

        return enter

    @property
    def period(self) -> int:
        """Steps until each call of a step has had its turn."""
        return self.every * self._total

    def begin_step(self, step: int) -> None:
        """Choose the call of this step; the first step only counts them."""
        self._count = 0
        if self.every:
            set_observer(self)
        due = self.every > 0 and step % self.every == 0 and self._total > 0
        self._target = step // self.every % self._total if due else -1

    def end_step(self) -> None:
        """What runs until the next step, validation for example, is neither repeated nor counted."""
        self._total, self._target = self._count, -1
        if self.every:
            set_observer(None)

    def take(self) -> list[Difference]:
        """The differences found since the last call."""
        found, self.differences = self.differences, []
        return found

    def _is_chosen(self) -> bool:
        self._count += 1
        return self._count - 1 == self._target

    def forward(self, name: str, plain: Callable[..., Any], ctx: Any, args: tuple[Any, ...]) -> Any:
        ctx.module = self.module
        result = plain(ctx, *args)
        if self._is_chosen():
            held = {"needs_input_grad": ctx.needs_input_grad}
            self._repeat(f"{name}, forward", plain, args, held, result, self.module)
        return result

    def backward(self, name: str, plain: Callable[..., Any], ctx: Any, grads: tuple[Any, ...]) -> Any:
        if getattr(ctx, "store", None) is not None:
            ctx.store = self._in_module(ctx.store, ctx.module)
        # Unpacked once: a second time, under activation recomputation, would be an error
        held = {**vars_of(ctx), "saved_tensors": ctx.saved_tensors, "needs_input_grad": ctx.needs_input_grad}
        self.module = ctx.module  # unpacking may have run other modules again
        if not self._is_chosen():
            return plain(Scratch(**held), *grads)
        with unobserved():  # a part that is a call of its own is repeated with the whole
            result = plain(Scratch(**held), *grads)
        self._repeat(f"{name}, backward", plain, grads, held, result, ctx.module)
        return result

    def _in_module(self, store: Callable[[Callable[[], Tensor]], None], module: str) -> Any:
        """A store of weight gradients whose computations, which run later, are of ``module``."""

        def put(compute: Callable[[], Tensor]) -> None:
            def run() -> Tensor:
                self.module = module
                return compute()

            store(run)

        return put

    def call(self, name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        result = function(*args)
        if self._is_chosen():
            self._repeat(name, function, args, None, result, self.module)
        return result

    def _repeat(
        self,
        name: str,
        plain: Callable[..., Any],
        args: tuple[Any, ...],
        held: dict[str, Any] | None,
        result: Any,
        module: str,
    ) -> None:
        """Run a call again from permuted operands; keep what differs. ``held`` is None for a function of tensors."""
        self.checked += 1
        repeat = repetition(plain, args, held)
        first, second = listed(result), repeat(permuted=True)
        if (found := compared(first, second)) is None:
            return
        third, fourth = repeat(permuted=False), repeat(permuted=True)
        if compared(second, fourth) is not None or compared(third, first) is not None is not compared(third, second):
            persistence = Persistence.unstable
        elif compared(third, second) is None:
            persistence = Persistence.transient
        else:
            persistence = Persistence.lasting
        saved = SavedCall.of(name, args, held, first, second)
        self.differences.append(Difference(name, module, persistence, *found, saved))


def repetition(
    plain: Callable[..., Any], args: tuple[Any, ...], held: dict[str, Any] | None
) -> Callable[..., list[Tensor | None]]:
    """A function that repeats a call, ``permuted`` or not, and lists its results."""

    @torch.no_grad()
    def repeat(permuted: bool) -> list[Tensor | None]:
        context = () if held is None else (Scratch(**{**held, **({"store": ignore} if held.get("store") else {})}),)
        with unobserved():
            if not permuted:
                return listed(plain(*context, *args))
            with permuting():
                return listed(plain(*context, *args))

    return repeat


def vars_of(ctx: Any) -> dict[str, Any]:
    """The attributes that a forward has set on autograd's context."""
    return dict(ctx.__dict__)


def listed(result: Any) -> list[Tensor | None]:
    """The tensors of a result; None for what is none."""
    parts = result if isinstance(result, tuple | list) else (result,)
    return [part if isinstance(part, Tensor) else None for part in parts]


WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compared(first: list[Tensor | None], second: list[Tensor | None]) -> tuple[int, float] | None:
    """How many elements have other bits, and their largest difference; None if all bits are equal.

    What only one of them has is not compared: a deferred weight gradient is a call of its own.
    """
    elements, largest = 0, 0.0
    for one, other in zip(first, second, strict=True):
        if one is None or other is None:
            continue
        one, other = one.detach(), other.detach()
        if one.shape != other.shape or one.dtype != other.dtype:
            return max(one.numel(), 1), float("inf")
        words = WORDS[one.element_size()] if not one.is_complex() else None
        if words is None:
            one, other = torch.view_as_real(one), torch.view_as_real(other)
            words = WORDS[one.element_size()]
        if torch.equal(one.view(words), other.view(words)):
            continue
        differs = one.view(words) != other.view(words)
        elements += int(differs.sum())
        largest = max(largest, float((one[differs].double() - other[differs].double()).abs().max()))
    return (elements, largest) if elements else None
