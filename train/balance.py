"""Control of the compute budget: selection biases from the loads of the global batch, outside the loss (section 4)."""

# L layers, N FFN experts, Z identity experts

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from longcat.config import ModelConfig
from longcat.config_choices import check_choice
from longcat.errors import ConfigError

if TYPE_CHECKING:  # the configuration is read without torch
    from torch import Tensor


class BalanceMethod(StrEnum):
    """The bias controllers."""

    pid = "pid"
    sign = "sign"


@dataclass
class BalanceConfig:
    """The bias controller and the device-level balance loss.

    The default is the technical report's rule, `ki` alone (its μ); value and decay are unpublished. `smoothing` keeps
    single experts from swinging between full and empty, and so allows an integral gain that reaches the compute
    budget in tens of steps; `kp` makes up for the filter's lag (configs/experiment/quickstart.yaml).
    """

    method: BalanceMethod = BalanceMethod.pid  # pid, or sign: the bias moves by ki in the direction of the error
    kp: float = 0.0  # proportional gain
    ki: float = 0.1  # integral gain; alone it is the technical report's rule with this as μ (value unpublished)
    kd: float = 0.0  # derivative gain
    decay: float = 0.0  # the gains of step t (from 0) are divided by 1 + decay·t
    # first-order filter of the loads: error ← smoothing·error + (1 - smoothing)·this step's error
    smoothing: float = 0.0
    # D, groups of experts in the balance loss; divides model.num_experts. Never read from the layout
    num_groups: int = 1
    group_loss_weight: float = 1e-3  # α, weight of the device-level balance loss (unpublished)

    def validate(self) -> None:
        check_choice("balance.method", self.method, BalanceMethod)
        for name in ("kp", "ki", "kd", "decay", "group_loss_weight"):
            if getattr(self, name) < 0:
                raise ConfigError(f"balance.{name}={getattr(self, name)} must not be negative")
        if not 0.0 <= self.smoothing < 1.0:
            raise ConfigError(f"balance.smoothing={self.smoothing} must be from 0 up to, not including, 1")
        if self.num_groups < 1:
            raise ConfigError(f"balance.num_groups={self.num_groups} must be at least 1")


class BiasController(Protocol):
    """Computes the next step's biases from the global batch's selection counts; has a state."""

    def update(self, counts: Tensor) -> Tensor:
        """counts [L, N+Z] int64 of one global batch → biases [L, N+Z] float32, 0 for identity experts."""

    def state(self) -> dict[str, Tensor]:
        """Named tensors of the controller for a checkpoint, which is loaded into them in place."""


def load_error(counts: Tensor, model: ModelConfig) -> Tensor:
    """(K_e/K)/N - T_i/(K·T_all) for FFN experts [L, N] float64: positive where an expert gets too few tokens."""
    selections = counts.sum(1, keepdim=True).double()  # K·T_all
    target = model.expected_ffn_experts / (model.top_k * model.num_experts)
    return target - counts[:, : model.num_experts].double() / selections.clamp_min(1.0)


class PID:
    """b = kp·e + Σ ki·e + kd·Δe with gains that shrink over the steps; the report's rule is kp = kd = 0."""

    def __init__(self, config: BalanceConfig, model: ModelConfig) -> None:
        import torch

        self.config, self.model = config, model
        shape = (model.num_layers, model.num_experts)
        self.integral = torch.zeros(shape, dtype=torch.float64)
        self.previous = torch.zeros(shape, dtype=torch.float64)
        self.steps = torch.zeros((), dtype=torch.int64)

    def update(self, counts: Tensor) -> Tensor:
        gain = 1.0 / (1.0 + self.config.decay * float(self.steps))
        error = load_error(counts, self.model)
        if int(self.steps):
            error = self.config.smoothing * self.previous + (1.0 - self.config.smoothing) * error
        change = error - (self.previous if int(self.steps) else error)
        self.integral += gain * self.config.ki * error
        self.previous.copy_(error)
        self.steps += 1
        bias = self.integral + gain * (self.config.kp * error + self.config.kd * change)
        return with_identity(bias, self.model)

    def state(self) -> dict[str, Tensor]:
        return {"integral": self.integral, "previous": self.previous, "steps": self.steps}


class Sign:
    """b += ki·sign(error), with the same decay: the usual rule, for comparison."""

    def __init__(self, config: BalanceConfig, model: ModelConfig) -> None:
        import torch

        self.config, self.model = config, model
        self.bias = torch.zeros(model.num_layers, model.num_experts, dtype=torch.float64)
        self.steps = torch.zeros((), dtype=torch.int64)

    def update(self, counts: Tensor) -> Tensor:
        gain = self.config.ki / (1.0 + self.config.decay * float(self.steps))
        self.bias += gain * load_error(counts, self.model).sign()
        self.steps += 1
        return with_identity(self.bias, self.model)

    def state(self) -> dict[str, Tensor]:
        return {"bias": self.bias, "steps": self.steps}


def with_identity(bias: Tensor, model: ModelConfig) -> Tensor:
    """Append the identity experts' zeros: [L, N] → [L, N+Z] float32."""
    from torch.nn.functional import pad

    return pad(bias, (0, model.num_zero_experts)).float()


CONTROLLERS: dict[BalanceMethod, type[PID] | type[Sign]] = {BalanceMethod.pid: PID, BalanceMethod.sign: Sign}


def build_controller(config: BalanceConfig, model: ModelConfig) -> BiasController:
    return CONTROLLERS[config.method](config, model)
