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
    quantile = "quantile"


@dataclass
class BalanceConfig:
    """The bias controller and the device-level balance loss.

    The default is the technical report's rule, `ki` alone (its μ); value and decay are unpublished. `smoothing` keeps
    single experts from swinging between full and empty, and so allows an integral gain that reaches the compute
    budget in tens of steps; `kp` makes up for the filter's lag (configs/experiment/quickstart.yaml).
    """

    # pid; sign: the bias moves by ki in the direction of the error; quantile: it is set to what gives each expert its
    # share of the last batch, without gains
    method: BalanceMethod = BalanceMethod.pid
    kp: float = 0.0  # proportional gain
    ki: float = 0.1  # integral gain; alone it is the technical report's rule with this as μ (value unpublished)
    kd: float = 0.0  # derivative gain
    decay: float = 0.0  # the gains of step t (from 0) are divided by 1 + decay·t
    # first-order filter of the loads: error ← smoothing·error + (1 - smoothing)·this step's error; of the biases for
    # quantile
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

    margin_bins: int  # of the histograms that it needs; 0 for none

    def update(self, counts: Tensor, margins: Tensor) -> Tensor:
        """The next biases [L, N+Z] float32 from one global batch.

        counts [L, N+Z] int64; margins [L, N+Z, ``margin_bins``] int64, see `longcat.ops.selections.count_margins`.
        """

    def state(self) -> dict[str, Tensor]:
        """Named tensors of the controller for a checkpoint, which is loaded into them in place."""


def load_error(counts: Tensor, model: ModelConfig) -> Tensor:
    """(K_e/K)/N - T_i/(K·T_all) for FFN experts [L, N] float64: positive where an expert gets too few tokens."""
    selections = counts.sum(1, keepdim=True).double()  # K·T_all
    target = model.expected_ffn_experts / (model.top_k * model.num_experts)
    return target - counts[:, : model.num_experts].double() / selections.clamp_min(1.0)


class PID:
    """b = kp·e + Σ ki·e + kd·Δe with gains that shrink over the steps; the report's rule is kp = kd = 0."""

    margin_bins = 0

    def __init__(self, config: BalanceConfig, model: ModelConfig) -> None:
        import torch

        self.config, self.model = config, model
        shape = (model.num_layers, model.num_experts)
        self.integral = torch.zeros(shape, dtype=torch.float64)
        self.previous = torch.zeros(shape, dtype=torch.float64)
        self.steps = torch.zeros((), dtype=torch.int64)

    def update(self, counts: Tensor, margins: Tensor) -> Tensor:
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

    margin_bins = 0

    def __init__(self, config: BalanceConfig, model: ModelConfig) -> None:
        import torch

        self.config, self.model = config, model
        self.bias = torch.zeros(model.num_layers, model.num_experts, dtype=torch.float64)
        self.steps = torch.zeros((), dtype=torch.int64)

    def update(self, counts: Tensor, margins: Tensor) -> Tensor:
        gain = self.config.ki / (1.0 + self.config.decay * float(self.steps))
        self.bias += gain * load_error(counts, self.model).sign()
        self.steps += 1
        return with_identity(self.bias, self.model)

    def state(self) -> dict[str, Tensor]:
        return {"bias": self.bias, "steps": self.steps}


class Quantile:
    """Each bias moves by the margin that as many of the batch's lie below as tokens should select the expert.

    That is K_e/N of the tokens for FFN experts and (K - K_e)/Z for identity experts, which have biases here, unlike
    with the other rules; their mean is 0. Section 4's third rule. The bins of the margins are finest around 0, the
    present bias, so that they fit any number of experts and get better as the biases settle.
    """

    margin_bins = 512

    def __init__(self, config: BalanceConfig, model: ModelConfig) -> None:
        import torch

        from longcat.ops.selections import margin_edges

        if model.top_k >= model.num_routed:
            raise ConfigError(
                f"balance.method=quantile needs more experts than model.top_k={model.top_k}: with {model.num_routed} "
                f"each token selects all; use balance.method=pid"
            )
        self.config, self.model = config, model
        self.bias = torch.zeros(model.num_layers, model.num_routed, dtype=torch.float64)
        self.steps = torch.zeros((), dtype=torch.int64)
        self.edges = margin_edges(model.num_routed, self.margin_bins)
        wanted, identity = model.expected_ffn_experts, model.num_zero_experts
        shares = [wanted / model.num_experts] * model.num_experts
        shares += [(model.top_k - wanted) / max(identity, 1)] * identity
        self.shares = torch.tensor(shares, dtype=torch.float64)

    def update(self, counts: Tensor, margins: Tensor) -> Tensor:
        import torch

        asked = self.bias.float() + quantiles(margins, self.shares, self.edges)  # float: what the routers added
        centred = asked[:, self.model.num_experts :] if self.model.num_zero_experts else asked
        asked -= centred.mean(1, keepdim=True)  # a constant for all experts changes no selection
        kept = self.config.smoothing if int(self.steps) else 0.0
        self.bias.copy_(torch.lerp(asked, self.bias, kept))
        self.steps += 1
        return self.bias.float()

    def state(self) -> dict[str, Tensor]:
        return {"bias": self.bias, "steps": self.steps}


def quantiles(histograms: Tensor, shares: Tensor, edges: Tensor) -> Tensor:
    """The values below which ``shares`` [E] of the counts lie: [L, E] float64, linear within a bin.

    A share of 0 has half a count below it: biases that no token needs stop where it does. histograms [L, E, bins]
    int64, edges [bins + 1] float64.
    """
    import torch

    below = histograms.cumsum(2).double()
    wanted = (shares * below[..., -1]).clamp_min(0.5)[..., None]
    bins = torch.searchsorted(below, wanted).clamp_max(histograms.shape[2] - 1)
    inside = histograms.gather(2, bins).double()
    part = (wanted - below.gather(2, bins) + inside) / inside.clamp_min(1.0)
    low, high = edges[bins], edges[bins + 1]
    return (low + part.clamp(0.0, 1.0) * (high - low)).squeeze(2)


def with_identity(bias: Tensor, model: ModelConfig) -> Tensor:
    """Append the identity experts' zeros: [L, N] → [L, N+Z] float32."""
    from torch.nn.functional import pad

    return pad(bias, (0, model.num_zero_experts)).float()


CONTROLLERS: dict[BalanceMethod, type[PID] | type[Sign] | type[Quantile]] = {
    BalanceMethod.pid: PID,
    BalanceMethod.sign: Sign,
    BalanceMethod.quantile: Quantile,
}


def build_controller(config: BalanceConfig, model: ModelConfig) -> BiasController:
    return CONTROLLERS[config.method](config, model)
