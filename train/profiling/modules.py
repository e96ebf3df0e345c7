"""Which module of the model computes: hooks on its modules while a step is profiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from longcat.model import LongCat
from parallel.torch_internals import has_compiled_forward
from parallel.watchdog.events import Event, SpanKind

OnModule = Callable[[Event, float, float], None]  # event, start and end in seconds of `time.monotonic`


def traced_modules(model: LongCat) -> Iterator[tuple[Event, nn.Module]]:
    """The modules that take time, each with its event."""
    if model.embed_tokens is not None:
        yield Event(SpanKind.EMBEDDING), model.embed_tokens
    for name, layer in zip(model.layers, model.shortcut_layers(), strict=True):
        number = int(name)
        for index in range(2):
            yield Event(SpanKind.ATTENTION, number, index), layer.self_attn[index]
            yield Event(SpanKind.DENSE_FFN, number, index), layer.mlps[index]
            yield Event(SpanKind.NORM, number), layer.input_layernorm[index]
            yield Event(SpanKind.NORM, number), layer.post_attention_layernorm[index]
        yield Event(SpanKind.ROUTER, number), layer.mlp.router
        yield Event(SpanKind.EXPERTS, number), layer.mlp.experts
    if model.mtp is not None:
        for predictor in model.mtp.layers:
            yield Event(SpanKind.MTP), predictor


@contextmanager
def module_hooks(models: Sequence[LongCat], on_module: OnModule) -> Iterator[None]:
    """Report each module's forward. Compiled modules have no hooks, which would retrace them."""
    handles: list[RemovableHandle] = []
    for model in models:
        for event, module in traced_modules(model):
            if not has_compiled_forward(module):
                handles += _hook(event, module, on_module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(event: Event, module: nn.Module, on_module: OnModule) -> list[RemovableHandle]:
    starts: list[float] = []

    def before(*_: Any) -> None:
        starts.append(monotonic())

    def after(*_: Any) -> None:
        on_module(event, starts.pop(), monotonic())

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
