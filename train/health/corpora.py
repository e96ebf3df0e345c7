"""Notices a corpus on which the validation loss rises, which the mean over all corpora can hide."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from train.health.events import EventKind, HealthEvent
from train.new_run import new_run

PREFIX = "val_loss/"  # of the metrics with the loss of one corpus


class CorpusWatch:
    """Compares each corpus's validation loss with its lowest so far.

    Args:
        worse_by: nats per token above the lowest loss that are reported; 0 = nothing is.
        past: earlier lines of metrics.jsonl, of a run that is resumed.
    """

    def __init__(self, worse_by: float, past: Iterable[dict[str, Any]] = ()) -> None:
        self.worse_by = worse_by
        self.restart()
        for row in past:
            self.see(int(row["step"]), losses_in(row), row.get("val_loss"))

    def restart(self) -> None:
        """Forget all losses: the next ones are of other windows."""
        self.best: dict[str, tuple[float, int]] = {}  # corpus → lowest loss, its step
        self.worse: set[str] = set()
        self.mean: dict[int, float] = {}  # step → loss over all corpora

    def see(self, step: int, losses: dict[str, float], mean: Any) -> list[HealthEvent]:
        """Judge the validation of a step: nats per token by corpus, and over all."""
        found = []
        if isinstance(mean, int | float):
            self.mean[step] = float(mean)
        for name, loss in losses.items():
            if not math.isfinite(loss):
                continue
            lowest, when = self.best.setdefault(name, (loss, step))
            if loss < lowest:
                self.best[name] = (loss, step)
            is_worse = self.worse_by > 0 and loss - self.best[name][0] >= self.worse_by
            if is_worse and name not in self.worse:
                self.worse.add(name)
                found.append(self._describe(EventKind.corpus_worse, name, step, loss, lowest, when))
            elif not is_worse and name in self.worse:
                self.worse.remove(name)
                found.append(self._describe(EventKind.corpus_recovered, name, step, loss, lowest, when))
        return found

    def _describe(self, kind: EventKind, name: str, step: int, loss: float, lowest: float, when: int) -> HealthEvent:
        fields = {"corpus": name, "val_loss": loss, "lowest": lowest, "lowest_step": when}
        if kind is EventKind.corpus_recovered:
            text = f"step {step}: the validation loss of {name}, {loss:.4f}, is near its lowest again ({lowest:.4f})"
            return HealthEvent(step, kind, text, fields)
        text = f"step {step}: the validation loss of {name} is {loss:.4f}, and was {lowest:.4f} at step {when}"
        if when in self.mean and step in self.mean:
            change = self.mean[step] - self.mean[when]
            text += f", while that of all corpora {'fell' if change < 0 else 'rose'} by {abs(change):.4f}"
        advice = new_run("a lower optim.lr, or a larger share of it in a later stage", "optim.lr", "data.stages")
        return HealthEvent(step, kind, f"{text}; {advice}", fields)


def losses_in(row: dict[str, Any]) -> dict[str, float]:
    """Corpus → validation loss in a line of metrics.jsonl."""
    found = {key.removeprefix(PREFIX): value for key, value in row.items() if key.startswith(PREFIX)}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
