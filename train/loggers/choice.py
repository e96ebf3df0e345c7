"""The loggers that a configuration selects."""

from __future__ import annotations

from train.config import Config, WandbMode
from train.loggers.interface import Guarded, MetricsSink, SinkGroup
from train.loggers.jsonl import JsonLines
from train.loggers.tensorboard_logger import TensorBoardLogger
from train.loggers.wandb_logger import WandbLogger
from train.run_dir.files import Note


def open_loggers(config: Config, resumed_step: int, note: Note) -> MetricsSink:
    """The first rank's loggers; what they say goes to ``note``. Steps after ``resumed_step`` are trained again."""
    sinks: list[MetricsSink] = [JsonLines(config, resumed_step, note)]
    if config.logging.wandb != WandbMode.disabled:
        sinks.append(Guarded("wandb", lambda: WandbLogger(config, note), note))
    if config.logging.tensorboard:
        folder = config.run.folder
        sinks.append(Guarded("TensorBoard", lambda: TensorBoardLogger(folder, resumed_step), note))
    return SinkGroup(sinks)
