"""The training objective: sums of the losses over the global batch, each divided by its count."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from longcat.errors import ConfigError

if TYPE_CHECKING:  # the configuration is read without torch, so that a wrong key is answered at once
    from torch import Tensor

    from longcat.model import Losses


@dataclass
class LossConfig:
    """Weights of the auxiliary losses; the language-model loss has weight 1."""

    mtp_weight: float = 0.3  # weight of the MTP cross-entropy (unpublished); 0 = MTP is off
    mtp_start_tokens: int = 0  # train MTP from the step on at whose start this many tokens have been seen
    hidden_z_weight: float = 1e-7  # λ of the hidden z-loss (section 9); 0 = off

    def validate(self) -> None:
        for name in ("mtp_weight", "mtp_start_tokens", "hidden_z_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loss.{name}={getattr(self, name)} must not be negative")


@dataclass(frozen=True)
class Divisors:
    """The divisors of one step's sums; the same on every rank, known before the first backward."""

    valid_tokens: int  # labels of the language model in the global batch
    mtp_tokens: int  # labels of all MTP layers
    tokens: int  # positions that hold text
    micro_batches: int  # of the global batch: the balance loss is a mean over them
    padding: int = 0  # positions that hold none
    attended: int = 0  # pairs of a token and a key that it attends to, for FLOPs


def objective(losses: Losses, divisors: Divisors, config: LossConfig, balance_weight: float) -> Tensor:
    """One micro-batch's term of the step's loss, which is the sum over all ranks and micro-batches."""
    total = losses.lm / max(divisors.valid_tokens, 1)
    total = total + config.mtp_weight * losses.mtp / max(divisors.mtp_tokens, 1)
    total = total + balance_weight * losses.balance / divisors.micro_batches
    return total + config.hidden_z_weight * losses.hidden_z / divisors.tokens
