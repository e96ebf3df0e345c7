"""AdamW over fp32 master weights, with parameter groups by role."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from longcat.errors import ConfigError
from longcat.roles import RULES

if TYPE_CHECKING:  # the configuration is read without torch
    import torch


@dataclass
class RateScales:
    """Factors of `optim.lr` by role of a parameter (longcat/roles.py); `longcat transfer` sets them."""

    embedding: float = 1.0  # the embedding
    hidden: float = 1.0  # attention and dense FFN matrices
    expert: float = 1.0  # FFN experts
    head: float = 1.0  # the output head
    router: float = 1.0  # routers
    norm: float = 1.0  # gains of the norms


@dataclass
class OptimConfig:
    """AdamW over fp32 master weights. ε is that of section 9; betas, decay, clipping and peak rate are unpublished."""

    lr: float = 1e-3  # peak learning rate
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])  # decay rates of the two moments
    eps: float = 1e-16  # ε of Adam
    weight_decay: float = 0.1  # decoupled weight decay, of `hidden`, `expert` and `head` matrices only
    grad_clip: float = 1.0  # gradients with a larger norm are scaled down to this norm; 0 = no clipping
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
    """AdamW over parameter groups, each with the rate and decay of its "role"."""
    import torch

    from parallel.torch_internals import optimize_without_compiler

    optimize_without_compiler()
    for group in groups:
        group["lr"] = config.lr * getattr(config.lr_scale, group["role"])
        group["weight_decay"] = config.weight_decay if RULES[group["role"]].decays else 0.0
    betas = (config.betas[0], config.betas[1])
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)


def set_rates(optimizer: torch.optim.AdamW, config: OptimConfig, factor: float) -> None:
    """Set every group's rate to its peak times ``factor``."""
    for group in optimizer.param_groups:
        group["lr"] = config.lr * getattr(config.lr_scale, group["role"]) * factor
