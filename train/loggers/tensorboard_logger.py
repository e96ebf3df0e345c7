"""Metrics as TensorBoard event files in the run folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "tensorboard"
FLUSH_SECONDS = 10


class TensorBoardLogger:
    """Writes every number of the metrics as a scalar. Needs the package `tensorboard`."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard then hides the steps of an earlier start that are trained again
        self.writer = SummaryWriter(
            str(folder / FOLDER), purge_step=resumed_step + 1 if resumed_step else None, flush_secs=FLUSH_SECONDS
        )

    def write(self, metrics: dict[str, Any], counts: Tensor, biases: Tensor) -> None:
        for key, value in metrics.items():
            if isinstance(value, int | float) and key != "step":
                self.writer.add_scalar(key, value, metrics["step"])

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
