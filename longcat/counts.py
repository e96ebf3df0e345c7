"""Parameters, active parameters and FLOPs per token of a model, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass

from longcat.config import ModelConfig


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters. ``total`` includes embedding and head but not MTP, like the report's 560B."""

    embedding: int
    head: int
    attention: int  # one block
    dense_ffn: int  # one block
    expert: int  # one FFN expert
    router: int  # one layer
    norms: int  # one layer's four norms
    mtp: int  # all MTP layers; embedding and head are shared and not counted again
    total: int


def count_parameters(config: ModelConfig) -> Counts:
    """Count the parameters by component. The routers' selection biases are state, not parameters."""
    d, heads = config.hidden_size, config.num_heads
    attention = (
        d * config.q_lora_rank
        + config.q_lora_rank
        + config.q_lora_rank * heads * config.qk_head_dim
        + d * (config.kv_lora_rank + config.qk_rope_head_dim)
        + config.kv_lora_rank
        + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
        + heads * config.v_head_dim * d
    )
    dense_ffn = 3 * d * config.ffn_hidden_size
    expert = 3 * d * config.expert_hidden_size
    router = config.num_routed * d
    norms = 4 * d
    embedding = head = config.vocab_size * d
    layer = 2 * attention + 2 * dense_ffn + config.num_experts * expert + router + norms
    mtp_layer = attention + dense_ffn + 2 * d * d + 4 * d
    mtp = config.num_mtp_layers * mtp_layer + (d if config.num_mtp_layers else 0)
    return Counts(
        embedding=embedding,
        head=head,
        attention=attention,
        dense_ffn=dense_ffn,
        expert=expert,
        router=router,
        norms=norms,
        mtp=mtp,
        total=embedding + head + d + config.num_layers * layer,
    )


def active_parameters(config: ModelConfig, ffn_experts: float) -> float:
    """Active parameters of a token with ``ffn_experts`` FFN experts: with the head, without embedding and MTP."""
    counts = count_parameters(config)
    layer = 2 * counts.attention + 2 * counts.dense_ffn + ffn_experts * counts.expert + counts.router + counts.norms
    return config.num_layers * layer + counts.head + config.hidden_size


def active_range(config: ModelConfig) -> tuple[float, float, float]:
    """Active parameters with the fewest, the expected and the most FFN experts (18.69 / 27.15 / 31.38B at 560B)."""
    fewest = max(0, config.top_k - config.num_zero_experts)
    most = min(config.top_k, config.num_experts)
    return (
        active_parameters(config, fewest),
        active_parameters(config, config.expected_ffn_experts),
        active_parameters(config, most),
    )


def flops_per_token(
    config: ModelConfig,
    sequence_length: int,
    ffn_experts: float | None = None,
    mtp: bool = False,
    keys: float | None = None,
) -> float:
    """Model FLOPs of forward and backward for one token: 6 per active parameter, plus the products of causal attention.

    Identity experts cost none and recomputation is not counted. ``ffn_experts`` is the measured number of FFN experts
    per token (default: the expected one), so that MFU stays honest when a router drifts. ``keys`` is the mean number of
    keys that a token attends to (default: that of a sequence of one document).
    """
    counts = count_parameters(config)
    used = config.expected_ffn_experts if ffn_experts is None else ffn_experts
    # Includes the norms' gains, which are no GEMM: under 0.1 % of any preset
    weights = active_parameters(config, used)
    attended = (sequence_length + 1) / 2 if keys is None else keys
    scores = config.num_heads * (config.qk_head_dim + config.v_head_dim) * attended
    blocks = 2 * config.num_layers
    if mtp and config.num_mtp_layers:
        weights += counts.mtp + config.num_mtp_layers * counts.head
        blocks += config.num_mtp_layers
    return 6.0 * (weights + blocks * scores)


def describe(config: ModelConfig) -> list[tuple[str, str]]:
    """The derived numbers as (name, text) rows, which a run prints when it starts."""
    counts = count_parameters(config)
    low, expected, high = active_range(config)
    return [
        ("parameters", f"{human(counts.total)} (+ {human(counts.mtp)} for MTP)"),
        ("active parameters", f"{human(low)} / {human(expected)} / {human(high)} (fewest / expected / most)"),
        (
            "experts",
            f"{config.num_experts} FFN + {config.num_zero_experts} identity, {config.top_k} chosen, "
            f"{config.expected_ffn_experts:g} FFN expected",
        ),
    ]


def flops_row(config: ModelConfig, sequence_length: int, masks_documents: bool) -> tuple[str, str]:
    """The row (name, text) of the FLOPs per token, for people."""
    flops = human(flops_per_token(config, sequence_length))
    text = f"{flops} forward and backward at train.sequence_length={sequence_length}"
    return "FLOPs per token", text + ("; fewer where a sample holds several documents" if masks_documents else "")


def human(number: float) -> str:
    """A count with a unit: 560.66B, 12.53M, 4.10K."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.2f}{unit}"
    return f"{number:.0f}"
