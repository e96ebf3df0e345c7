"""AdamW over float32 masters, with parameter groups by role."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from longcat.errors import ConfigError
from longcat.names import role

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


def build_optimizer(models: Sequence[nn.Module], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with one group for each role, and moments that exist from the start.

    Moments made at once mean that a part which joins late (MTP) is in every checkpoint and every hash.
    """
    by_role: dict[str, list[nn.Parameter]] = defaultdict(list)
    for name, parameter in (pair for model in models for pair in model.named_parameters()):
        by_role[role(name)].append(parameter)
    groups = [
        {
            "params": parameters,
            "role": kind,
            "lr": config.lr * getattr(config.lr_scale, kind),
            "weight_decay": config.weight_decay if kind in DECAYED_ROLES else 0.0,
        }
        for kind, parameters in by_role.items()
    ]
    betas = (config.betas[0], config.betas[1])
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    for parameter in (parameter for model in models for parameter in model.parameters()):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, requires_grad=False),
            "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
        }
    return optimizer


def set_rates(optimizer: torch.optim.AdamW, config: OptimConfig, factor: float) -> None:
    """Set every group's rate to its peak times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = config.lr * getattr(config.lr_scale, group["role"]) * factor
