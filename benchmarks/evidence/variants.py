"""Models that no configuration key makes: the framework's own layer with one property of LongCat-Flash removed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from longcat.config import ModelConfig
from longcat.documents import Documents
from longcat.layer import ShortcutLayer
from longcat.moe import RoutingStatistics


def no_scale_correction() -> None:
    """MLA without variance alignment: α_q = α_kv = 1 (section 6 of the equations)."""
    ModelConfig.query_scale = property(lambda self: 1.0)  # type: ignore[method-assign,assignment]
    ModelConfig.latent_scale = property(lambda self: 1.0)  # type: ignore[method-assign,assignment]


def no_shortcut() -> None:
    """Without the shortcut (section 2) the experts read what the second FFN reads, like a shared expert beside them.

    Parameters, FLOPs and initial values are those of the layer with the shortcut.
    """

    def forward(
        self: ShortcutLayer, x: Tensor, angles: Tensor, documents: Documents | None = None
    ) -> tuple[Tensor, RoutingStatistics]:
        attention, ffn, moe = self.self_attn, self.mlps, self.mlp
        a = x + attention[0](self.input_layernorm[0](x), angles, documents)
        b = a + ffn[0](self.post_attention_layernorm[0](a))
        c = b + attention[1](self.input_layernorm[1](b), angles, documents)
        v = self.post_attention_layernorm[1](c)
        pending = moe.dispatch(v.flatten(0, 1), documents)
        moe.send_rows(pending)
        m, statistics = moe.combine(moe.compute(pending))
        return c + ffn[1](v) + m.view_as(v), statistics

    ShortcutLayer.forward = forward  # type: ignore[method-assign]


VARIANTS: dict[str, Callable[[], None]] = {one.__name__: one for one in (no_scale_correction, no_shortcut)}
