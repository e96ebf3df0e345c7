"""Names of what the backward can compute again, without torch: the configuration has them."""

from __future__ import annotations

from enum import StrEnum


class Value(StrEnum):
    """What of a layer can be computed again."""

    norms = "norms"  # results of RMSNorm
    expansion = "expansion"  # queries, keys and values of all heads, from their latents
    attention = "attention"  # results of attention, and what its backward needs of them
    ffn_gate = "ffn_gate"  # the dense FFNs' projections before SwiGLU
    ffn_up = "ffn_up"
    expert_input = "expert_input"  # tokens in the order of their experts
    expert_hidden = "expert_hidden"  # the experts' projections before SwiGLU
