"""The sizes of a LongCat-Flash model, and their validation (longcat_flash report, section 2)."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from longcat.config_limits import INT32_MAX, check_at_most
from longcat.errors import ConfigError
from longcat.rope import RopeScaling

MAX_LAYERS = 4096  # deeper ones take longer to build than to train


@dataclass
class ModelConfig:
    """Sizes of one model; `model=PRESET` sets them together (configs/model).

    A layer is one shortcut layer: two attention blocks, two dense FFNs and one mixture of experts.
    """

    name: str = "tiny"  # name of the preset; a label only
    # rows of the embedding and the head; also the size of a tokenizer trained by `longcat data build`
    vocab_size: int = 4096
    num_layers: int = 4  # shortcut layers L
    hidden_size: int = 256  # D, width of the residual stream
    num_heads: int = 4  # H, attention heads
    q_lora_rank: int = 96  # width of the query latent
    kv_lora_rank: int = 64  # width of the key-value latent
    qk_nope_head_dim: int = 32  # query/key width per head without position
    qk_rope_head_dim: int = 16  # query/key width per head with rotary position; even
    v_head_dim: int = 32  # value width per head
    ffn_hidden_size: int = 512  # inner width of each dense FFN
    num_experts: int = 16  # N, FFN (SwiGLU) experts per layer
    num_zero_experts: int = 8  # Z, identity experts per layer
    top_k: int = 6  # K, experts chosen per token; at most N + Z
    # K_e, the compute budget: FFN experts per token on average; at most K and N, equal to K when Z = 0
    expected_ffn_experts: float = 4.0
    expert_hidden_size: int = 128  # inner width of each FFN expert
    routed_scaling_factor: float = 4.0  # γ, multiplies every gate, those of identity experts too
    num_mtp_layers: int = 1  # multi-token prediction layers; 0 = none
    rope_theta: float = 1e6  # base of the rotary frequencies
    rope_scaling: RopeScaling = field(default_factory=RopeScaling)
    rms_norm_eps: float = 1e-5  # ε of the RMS norms
    latent_norm_eps: float = 1e-6  # ε of the two latent norms inside MLA
    embedding_std: float = 0.02  # standard deviation of the embedding's initial values (unpublished)
    # of all other matrices; divided by √(4·L) where they write to the residual stream (unpublished)
    hidden_std: float = 0.02

    @property
    def num_routed(self) -> int:
        """N + Z, the width of the router."""
        return self.num_experts + self.num_zero_experts

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def query_scale(self) -> float:
        """α_q, the variance alignment of the queries (section 2.1.3 of the report)."""
        return float((self.hidden_size / self.q_lora_rank) ** 0.5)

    @property
    def latent_scale(self) -> float:
        """α_kv, the variance alignment of the key-value latent after its norm."""
        return float((self.hidden_size / self.kv_lora_rank) ** 0.5)

    @property
    def softmax_scale(self) -> float:
        return float(self.qk_head_dim**-0.5) * self.rope_scaling.score_scale

    @staticmethod
    def from_mapping(values: dict[str, Any]) -> ModelConfig:
        """A model from the nested mapping that `asdict` makes; missing fields have their defaults.

        Raises:
            TypeError: a field that does not exist.
        """
        scaling = values.get("rope_scaling") or {}
        return ModelConfig(**{**values, "rope_scaling": RopeScaling(**scaling)})

    def validate(self) -> None:
        """Raise ConfigError for sizes that no model can have."""
        positive = (
            "vocab_size", "num_layers", "hidden_size", "num_heads", "q_lora_rank", "kv_lora_rank",
            "qk_rope_head_dim", "v_head_dim", "ffn_hidden_size", "num_experts", "top_k",
            "expert_hidden_size", "routed_scaling_factor", "rope_theta", "rms_norm_eps",
            "latent_norm_eps", "embedding_std", "hidden_std",
        )  # fmt: skip
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be above 0")
        for name in ("num_zero_experts", "num_mtp_layers", "qk_nope_head_dim"):
            if getattr(self, name) < 0:
                raise ConfigError(f"model.{name}={getattr(self, name)} must not be negative")
        for option in fields(self):
            if isinstance(getattr(self, option.name), int):
                check_at_most(f"model.{option.name}", getattr(self, option.name), INT32_MAX)
        for name in ("num_layers", "num_mtp_layers"):
            check_at_most(f"model.{name}", getattr(self, name), MAX_LAYERS)
        if self.rope_theta < 1:
            raise ConfigError(f"model.rope_theta={self.rope_theta} must be at least 1: no frequency may exceed 1")
        if self.qk_rope_head_dim % 2:
            raise ConfigError(
                f"model.qk_rope_head_dim={self.qk_rope_head_dim} must be even: rotary embeddings rotate pairs"
            )
        if self.top_k > self.num_routed:
            raise ConfigError(
                f"model.top_k={self.top_k} exceeds the {self.num_routed} experts of "
                f"num_experts+num_zero_experts; lower model.top_k or add experts"
            )
        self.rope_scaling.validate(self.rope_theta)
        self._validate_budget()

    def _validate_budget(self) -> None:
        expected, top_k = self.expected_ffn_experts, self.top_k
        if not 0 < expected <= top_k:
            raise ConfigError(f"model.expected_ffn_experts={expected} must be above 0 and at most model.top_k={top_k}")
        if expected > self.num_experts:
            raise ConfigError(
                f"model.expected_ffn_experts={expected} exceeds model.num_experts={self.num_experts}; lower it"
            )
        if self.num_zero_experts == 0 and expected != top_k:
            raise ConfigError(
                f"model.expected_ffn_experts={expected} is impossible with model.num_zero_experts=0: every selection "
                f"is an FFN expert; set it to model.top_k={top_k} or add identity experts"
            )
        if top_k - expected > self.num_zero_experts:
            raise ConfigError(
                f"model.expected_ffn_experts={expected} leaves {top_k - expected:g} identity selections per token, "
                f"but model.num_zero_experts={self.num_zero_experts}; raise either"
            )
