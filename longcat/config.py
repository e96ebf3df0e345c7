"""The sizes of a LongCat-Flash model, and the checks that they make sense (longcat_flash report, section 2)."""

from __future__ import annotations

from dataclasses import dataclass

from longcat.errors import ConfigError


@dataclass
class ModelConfig:
    """Sizes of one model; the presets stand in configs/model.

    A "layer" is one shortcut-connected layer: two attention blocks, two dense FFNs and one mixture of experts.
    """

    name: str = "tiny"
    vocab_size: int = 4096
    num_layers: int = 4
    hidden_size: int = 256
    num_heads: int = 4
    q_lora_rank: int = 96
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 16
    v_head_dim: int = 32
    ffn_hidden_size: int = 512
    num_experts: int = 16  # N, SwiGLU experts
    num_zero_experts: int = 8  # Z, identity experts
    top_k: int = 6  # K
    expected_ffn_experts: float = 4.0  # K_e
    expert_hidden_size: int = 128
    routed_scaling_factor: float = 4.0  # γ
    num_mtp_layers: int = 1
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-5
    latent_norm_eps: float = 1e-6  # the two norms inside MLA
    embedding_std: float = 0.02  # unpublished; the project's choice
    hidden_std: float = 0.02  # unpublished; all matrices but the embedding

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
        return float(self.qk_head_dim**-0.5)

    def validate(self) -> None:
        """Raise ConfigError for sizes that no model can have."""
        positive = (
            "vocab_size", "num_layers", "hidden_size", "num_heads", "q_lora_rank", "kv_lora_rank",
            "qk_rope_head_dim", "v_head_dim", "ffn_hidden_size", "num_experts", "top_k",
            "expert_hidden_size", "routed_scaling_factor", "rope_theta", "rms_norm_eps",
            "latent_norm_eps", "embedding_std", "hidden_std",
        )  # fmt: skip
        for field in positive:
            if not getattr(self, field) > 0:
                raise ConfigError(f"model.{field}={getattr(self, field)} must be above 0")
        for field in ("num_zero_experts", "num_mtp_layers", "qk_nope_head_dim"):
            if getattr(self, field) < 0:
                raise ConfigError(f"model.{field}={getattr(self, field)} must not be negative")
        if self.qk_rope_head_dim % 2:
            raise ConfigError(
                f"model.qk_rope_head_dim={self.qk_rope_head_dim} must be even: rotary positions turn pairs"
            )
        if self.top_k > self.num_routed:
            raise ConfigError(
                f"model.top_k={self.top_k} exceeds the {self.num_routed} experts of "
                f"num_experts+num_zero_experts; lower model.top_k or add experts"
            )
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
                f"model.expected_ffn_experts={expected} cannot hold with model.num_zero_experts=0: every choice is "
                f"an FFN expert; set it to model.top_k={top_k} or add identity experts"
            )
        if top_k - expected > self.num_zero_experts:
            raise ConfigError(
                f"model.expected_ffn_experts={expected} leaves {top_k - expected:g} identity choices a token, "
                f"but model.num_zero_experts={self.num_zero_experts}; raise either"
            )
