"""Judges each step: spikes, experts without tokens, small gradients, growing hidden norms; the same on every rank."""

# L layers, N FFN experts, Z identity experts

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

from torch import Tensor

from train.health import events
from train.health.config import HealthConfig, OnSpike
from train.health.events import HealthEvent, Spike, number
from train.health.spikes import LEAST_OF_LOSS, LEAST_OF_NORM, deviation, level, logarithm, push, recent_steps
from train.health.state import HealthState

# Gradient RMS over ε below which a part is reported: AdamW divides by sqrt(v) + ε, so ε shortens its steps by 1 %
EPS_MARGIN = 100.0
HIDDEN_GROWTH = 10.0  # growth of the hidden norm within a window that is reported
RECENT = 8  # of a window's steps, one in so many counts as its start and as its end

SpikeCheck = Callable[[Spike], None]


class HealthMonitor:
    """Keeps the health state up to date and decides what follows a spike.

    All that it is given is equal on all ranks, and so are its decisions. ``before_action`` is called on every rank with
    each spike before anything is done about it: a check for silent data corruption can look for another cause while
    weights and batch are still those of the step, and raise to end the run.
    """

    def __init__(self, config: HealthConfig, state: HealthState, num_experts: int, eps: float) -> None:
        self.config, self.state = config, state
        self.num_experts, self.eps = num_experts, eps
        self.before_action: SpikeCheck | None = None
        self.found: list[HealthEvent] = []  # since `take_events`
        self.deviations: tuple[float | None, float | None] = (None, None)  # of this step's loss and gradient norm
        self._small: set[str] = set()  # parts whose gradients are near ε
        self._growing = False

    def judge(self, step: int, first_sample: int, loss: float, grad_norm: float) -> Spike | None:
        """Compare a step with those before it, before its update; then it is one of them.

        A loss or norm that is not finite is a spike where a spike is left out (`skip`, `rollback`).
        """
        config, state = self.config, self.state
        values = {
            "loss": (loss, state.losses, LEAST_OF_LOSS),
            "gradient norm": (grad_norm, state.norms, LEAST_OF_NORM),
        }
        reasons, found = [], []
        for name, (value, window, least) in values.items():
            sigmas = None
            if math.isfinite(value) and config.window:
                sigmas = deviation(window, logarithm(value), config.window, least)
                if sigmas is not None and sigmas > config.sigmas:
                    usual = f"{number(math.exp(level(window)))} (median of {recent_steps(window)} steps)"
                    reasons.append(f"the {name} of {number(value)} is {sigmas:.1f} σ above {usual}")
                push(window, logarithm(value), config.window)
            found.append(sigmas)
        self.deviations = found[0], found[1]
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            if config.on_spike not in (OnSpike.skip, OnSpike.rollback):
                return None  # never applied anyway: the step itself says so
            reasons = [f"the loss is {number(loss)} and the gradient norm {number(grad_norm)}"]
        if not reasons:
            return None
        spike = self._decide(step, first_sample, loss, grad_norm, " and ".join(reasons))
        if self.before_action is not None:
            self.before_action(spike)
        if spike.action in (OnSpike.skip, OnSpike.rollback):
            state.strikes.append(step)
        return spike

    def _decide(self, step: int, first_sample: int, loss: float, grad_norm: float, reason: str) -> Spike:
        config, strikes = self.config, self.state.strikes
        if config.forget_after:
            strikes[:] = [one for one in strikes if step - one < config.forget_after]
        action, taken = config.on_spike, len(strikes)
        if action in (OnSpike.skip, OnSpike.rollback):
            if taken >= config.max_actions:
                action = OnSpike.stop
            else:
                taken += 1
        return Spike(step, first_sample, loss, grad_norm, reason, action, taken)

    def observe(
        self, step: int, counts: Tensor, hidden_norm: float, grad_rms: Mapping[str, float | None]
    ) -> dict[str, Any]:
        """Note what a step did to the model, also one that was left out; returns metrics.

        Args:
            counts: selections of the global batch [L, N+Z].
            grad_rms: RMS of the gradient of each part of the model, None where nothing was trained.
        """
        dead = self._observe_experts(step, counts)
        known = {part: rms for part, rms in grad_rms.items() if rms is not None}
        if all(map(math.isfinite, known.values())):
            self._observe_gradients(step, known)
        return {
            "loss_deviation": self.deviations[0],
            "grad_norm_deviation": self.deviations[1],
            "grad_rms_over_eps": min(known.values()) / self.eps,
            "hidden_norm_growth": self._observe_hidden(step, hidden_norm),
            "dead_experts": dead,
        }

    def take_events(self) -> list[HealthEvent]:
        """What was found since the last call."""
        found, self.found = self.found, []
        return found

    def _observe_experts(self, step: int, counts: Tensor) -> int:
        """The number of dead experts."""
        limit, before = self.config.dead_after, self.state.idle
        empty = (counts[:, : self.num_experts] == 0).nonzero().tolist()
        now = {(layer, expert): before.get((layer, expert), step) for layer, expert in empty}
        for (layer, expert), since in sorted(before.items()):
            if limit and (layer, expert) not in now and step - since >= limit:
                self.found.append(events.expert_revived(step, layer, expert, since))
        before.clear()
        before.update(now)
        if not limit:
            return 0
        self.found += [
            events.dead_expert(step, *place, since) for place, since in now.items() if step - since + 1 == limit
        ]
        return sum(step - since + 1 >= limit for since in now.values())

    def _observe_gradients(self, step: int, known: Mapping[str, float]) -> None:
        for part, rms in known.items():
            name = part.replace("_", " ")
            if rms < EPS_MARGIN * self.eps and part not in self._small:
                self._small.add(part)
                self.found.append(events.small_gradient(step, name, rms, self.eps))
            elif rms >= 2 * EPS_MARGIN * self.eps and part in self._small:
                self._small.remove(part)
                self.found.append(events.gradient_recovered(step, name, rms, self.eps))

    def _observe_hidden(self, step: int, norm: float) -> float | None:
        """How many times larger the hidden norm is at the end of the window than at its start; None before it is."""
        window, size = self.state.hidden, self.config.window
        if not size or not math.isfinite(norm):
            return None
        push(window, logarithm(norm), size)
        if len(window) < size:
            return None
        few = max(1, size // RECENT)
        growth = math.exp(median(window[-few:]) - median(window[:few]))
        is_growing = growth >= HIDDEN_GROWTH and step > 2 * size  # at first it grows in any run
        if is_growing and not self._growing:
            self.found.append(events.hidden_growth(step, norm, growth, size))
        self._growing = is_growing
        return growth
