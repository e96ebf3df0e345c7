"""The metrics of each step: metrics.jsonl, routing.jsonl and wandb."""

from __future__ import annotations

import json
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from train.config import Config, WandbMode

METRICS, ROUTING, SUPERSEDED = "metrics.jsonl", "routing.jsonl", "superseded.jsonl"


def move_after(path: Path, step: int, target: Path) -> int:
    """Keep the lines up to ``step`` in ``path``; append later and torn ones to ``target``. Returns how many moved."""
    if not path.is_file():
        return 0
    partial, moved = path.with_suffix(".partial"), 0
    with path.open() as lines, partial.open("w") as kept, target.open("a") as later:
        for line in lines:
            try:
                stays = json.loads(line)["step"] <= step
            except (ValueError, KeyError):
                stays = False
            (kept if stays else later).write(line if line.endswith("\n") else f"{line}\n")
            moved += not stays
    partial.replace(path)
    if not target.stat().st_size:
        target.unlink()
    return moved


class MetricsSink(Protocol):
    """Takes the metrics of each step."""

    def write(self, metrics: dict[str, Any], counts: Tensor, biases: Tensor) -> None:
        """Selection counts [L, N+Z] and biases [L, N+Z] belong to the same step as ``metrics``."""

    def close(self) -> None:
        """Wait until all is written; raises what went wrong."""


class NullMetricsWriter:
    """The sink of every rank but the first: it writes nothing."""

    def write(self, metrics: dict[str, Any], counts: Tensor, biases: Tensor) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Appends and flushes one object per step; floats keep their bits (Python writes the shortest exact form)."""

    def __init__(self, config: Config, resumed_step: int) -> None:
        self.config = config
        folder = config.run.folder
        self.num_moved = move_after(folder / METRICS, resumed_step, folder / SUPERSEDED)
        move_after(folder / ROUTING, resumed_step, folder / f"routing-{SUPERSEDED}")
        self.metrics = (folder / METRICS).open("a", buffering=1)
        self.routing = (folder / ROUTING).open("a", buffering=1)
        self.wandb = WandbWriter(config) if config.logging.wandb != WandbMode.disabled else None

    def write(self, metrics: dict[str, Any], counts: Tensor, biases: Tensor) -> None:
        self.metrics.write(json.dumps(metrics) + "\n")
        every = self.config.logging.routing_every
        if every and (metrics["step"] % every == 0 or metrics["step"] == 1):
            row = {"step": metrics["step"], "counts": counts.tolist(), "bias": biases.tolist()}
            self.routing.write(json.dumps(row) + "\n")
        if self.wandb is not None:
            self.wandb.write(metrics)

    def close(self) -> None:
        self.metrics.close()
        self.routing.close()
        if self.wandb is not None:
            self.wandb.close()


class WandbWriter:
    """Sends metrics to wandb from its own thread: starting wandb takes seconds that no step should wait for."""

    def __init__(self, config: Config) -> None:
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wandb")  # one thread: steps stay in order
        self.run = self.worker.submit(start_wandb, config)
        self.last: Future[None] | None = None

    def write(self, metrics: dict[str, Any]) -> None:
        known = {key: value for key, value in metrics.items() if value is not None and key != "step"}
        self.last = self.worker.submit(lambda: self.run.result().log(known, step=metrics["step"]))

    def close(self) -> None:
        """Wait until all is sent; raises what went wrong."""
        if self.last is not None:
            self.last.result()
        self.run.result().finish()
        self.worker.shutdown()


def start_wandb(config: Config) -> Any:
    """A wandb run, offline by default."""
    import wandb
    from omegaconf import OmegaConf

    return wandb.init(
        project="longcat",
        name=config.run.name,
        dir=str(config.run.folder),
        mode=str(config.logging.wandb),  # type: ignore[arg-type]
        config=OmegaConf.to_container(OmegaConf.structured(config), enum_to_str=True),  # type: ignore[arg-type]
        settings=wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True),
    )
