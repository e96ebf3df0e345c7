"""Rotary position embeddings: frequencies, scaled by YaRN or not, and the complex numbers that rotate pairs."""

# S positions, R rotary width

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from longcat.errors import ConfigError

if TYPE_CHECKING:  # the configuration is read without torch
    import torch
    from torch import Tensor


@dataclass
class RopeScaling:
    """YaRN (arXiv 2309.00071): rotary frequencies for contexts longer than those a model was pre-trained on.

    Fields and formulas are those of `rope_type: yarn` in transformers and of the DeepSeek models.
    """

    factor: float = 1.0  # YaRN: how many times longer the context becomes; 1 = no scaling
    # context length of the pre-training without YaRN; needed where factor is above 1
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0  # pairs that turn more often than this within the original context keep their frequency
    beta_slow: float = 1.0  # pairs that turn less often than this are slowed down by factor; those between, in part
    truncate: bool = True  # round the two bounds between these ranges to whole pairs, outwards
    # with mscale_all_dim: rotated queries and keys are multiplied by g(mscale) / g(mscale_all_dim), where
    # g(m) = 0.1·m·ln(factor) + 1; without either (0) by g(1)
    mscale: float = 0.0
    mscale_all_dim: float = 0.0  # the scores of attention are multiplied by g(mscale_all_dim)²; 0 = they are not
    attention_factor: float = 0.0  # multiplies rotated queries and keys instead of that quotient; 0 = not given

    @property
    def amplitude(self) -> float:
        """The number that multiplies rotated queries and keys."""
        if self.attention_factor:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return self.gain(self.mscale) / self.gain(self.mscale_all_dim)
        return self.gain(1.0)

    @property
    def score_scale(self) -> float:
        """The number that multiplies the scores of attention, in all dimensions."""
        return self.gain(self.mscale_all_dim) ** 2

    def gain(self, mscale: float) -> float:
        """g(mscale) = 0.1 · mscale · ln(factor) + 1."""
        return 0.1 * mscale * math.log(self.factor) + 1.0

    def validate(self, theta: float) -> None:
        """Raise ConfigError for values that no model can have; ``theta`` is the base of the frequencies."""
        section = "model.rope_scaling"
        if not self.factor >= 1:
            raise ConfigError(f"{section}.factor={self.factor} must be at least 1; 1 = no scaling")
        for field in ("original_max_position_embeddings", "mscale", "mscale_all_dim", "attention_factor"):
            if getattr(self, field) < 0:
                raise ConfigError(f"{section}.{field}={getattr(self, field)} must not be negative")
        if self.factor == 1:
            if self.attention_factor not in (0, 1):
                raise ConfigError(
                    f"{section}.attention_factor={self.attention_factor} needs {section}.factor above 1; set either"
                )
            return
        if not self.original_max_position_embeddings:
            raise ConfigError(
                f"{section}.factor={self.factor} needs {section}.original_max_position_embeddings, the context length "
                f"before scaling; set it"
            )
        if not 0 < self.beta_slow < self.beta_fast:
            raise ConfigError(
                f"{section}.beta_slow={self.beta_slow} must be above 0 and below {section}.beta_fast={self.beta_fast}"
            )
        if not theta > 1:
            raise ConfigError(f"model.rope_theta={theta} must be above 1 with {section}.factor={self.factor}")


def frequencies(width: int, theta: float, scaling: RopeScaling, device: torch.device | None = None) -> Tensor:
    """The angle per position of each rotary pair, [R/2] float32: θ^(-2i/width), changed by ``scaling``."""
    import torch

    turns = theta ** (torch.arange(0, width, 2, dtype=torch.float32, device=device) / width)
    plain = 1.0 / turns
    if scaling.factor == 1:
        return plain
    low, high = ramp(width, theta, scaling)
    pairs = torch.arange(width // 2, dtype=torch.float32, device=device)
    kept = 1.0 - ((pairs - low) / (high - low)).clamp(0.0, 1.0)
    return 1.0 / (scaling.factor * turns) * (1.0 - kept) + plain * kept


def ramp(width: int, theta: float, scaling: RopeScaling) -> tuple[float, float]:
    """The pairs up to which frequencies are kept, and from which on they are divided by the factor."""

    def pair_with(rotations: float) -> float:
        """The pair whose rotation turns ``rotations`` times within the original context, as a real number."""
        length = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return width * math.log(length) / (2 * math.log(theta))

    low, high = pair_with(scaling.beta_fast), pair_with(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    return low, high + 0.001 if low == high else high


def rotary_angles(positions: Tensor, width: int, theta: float, scaling: RopeScaling | None = None) -> Tensor:
    """Complex numbers [S, R/2] that rotate, and with ``scaling`` stretch, the pairs at ``positions`` [S]."""
    import torch

    scaling = scaling or RopeScaling()
    angles = positions.float()[:, None] * frequencies(width, theta, scaling, positions.device)[None, :]
    return torch.polar(torch.full_like(angles, scaling.amplitude), angles)
