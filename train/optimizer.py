"""AdamW over float32 masters, with parameter groups by role."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from longcat.errors import ConfigError

DECAYED_ROLES = (
    "hidden",
    "expert",
    "head",
)  # unpublished: matrices decay, gains, router and embedding do not


@dataclass
class RateScales:
    """Factors of ``optim.lr`` for each role of a parameter (section 7 divides hidden and head by the width ratio)."""

    embedding: float = 1.0
    hidden: float = 1.0
    expert: float = 1.0
    head: float = 1.0
    router: float = 1.0
    norm: float = 1.0


@dataclass
class OptimConfig:
    """AdamW. ε = 1e-16 as in section 9; betas, decay, clipping and peak rate are unpublished."""

    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-16
    weight_decay: float = 0.1
    grad_clip: float = 1.0  # 0 = no clipping
    lr_scale: RateScales = field(default_factory=RateScales)

    def validate(self) -> None:
        if not self.lr > 0:
            raise ConfigError(f"optim.lr={self.lr} must be above 0")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ConfigError(f"optim.betas={list(self.betas)} must be two numbers from 0 up to, not including, 1")
        if not self.eps > 0:
            raise ConfigError(f"optim.eps={self.eps} must be above 0: a weight without gradient would become NaN")
        for name in ("weight_decay", "grad_clip"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optim.{name}={getattr(self, name)} must not be negative")
        for name, scale in vars(self.lr_scale).items():
            if scale < 0:
                raise ConfigError(f"optim.lr_scale.{name}={scale} must not be negative")


def make_adamw(groups: list[dict[str, Any]], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over groups of parameters that name their "role", with its rate and decay."""
    for group in groups:
        group["lr"] = config.lr * getattr(config.lr_scale, group["role"])
        group["weight_decay"] = config.weight_decay if group["role"] in DECAYED_ROLES else 0.0
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def set_rates(optimizer: torch.optim.AdamW, config: OptimConfig, factor: float) -> None:
    """Set every group's rate to its peak times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = config.lr * getattr(config.lr_scale, group["role"]) * factor
