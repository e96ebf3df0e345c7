"""Which part of the model computes: hooks on its modules while a step is profiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from longcat.model import LongCat
from parallel.torch_internals import has_compiled_forward

Heard = Callable[[str, float, float], None]  # name, start, end in seconds of `time.monotonic`


def named_parts(model: LongCat) -> Iterator[tuple[str, nn.Module]]:
    """`attention 1, layer 3` and its module, for all that takes time."""
    if model.embed_tokens is not None:
        yield "embedding", model.embed_tokens
    for number, layer in zip(model.layers, model.shortcut_layers(), strict=True):
        for place in range(2):
            yield f"attention {place}, layer {number}", layer.self_attn[place]
            yield f"dense FFN {place}, layer {number}", layer.mlps[place]
            yield f"norm, layer {number}", layer.input_layernorm[place]
            yield f"norm, layer {number}", layer.post_attention_layernorm[place]
        yield f"router, layer {number}", layer.mlp.router
        yield f"experts, layer {number}", layer.mlp.experts
    if model.mtp is not None:
        for predictor in model.mtp.layers:
            yield "MTP", predictor


@contextmanager
def watched(models: Sequence[LongCat], heard: Heard) -> Iterator[None]:
    """Say when each part's forward begins and ends. Compiled modules stay as they are: a hook would retrace them."""
    handles: list[RemovableHandle] = []
    for model in models:
        for name, module in named_parts(model):
            if not has_compiled_forward(module):
                handles += _watch(name, module, heard)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(name: str, module: nn.Module, heard: Heard) -> list[RemovableHandle]:
    starts: list[float] = []

    def before(*_: Any) -> None:
        starts.append(monotonic())

    def after(*_: Any) -> None:
        heard(name, starts.pop(), monotonic())

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
