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
        self.folder = folder / FOLDER
        self.writer = self._open(resumed_step)

    def _open(self, step: int) -> Any:
        """A writer from whose start on TensorBoard hides the steps after ``step`` that it has."""
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder), purge_step=step + 1 if step else None, flush_secs=FLUSH_SECONDS)

    def rewind(self, step: int) -> None:
        self.writer.close()
        self.writer = self._open(step)

    def write(self, metrics: dict[str, Any], counts: Tensor, biases: Tensor) -> None:
        for key, value in metrics.items():
            if isinstance(value, int | float) and key != "step":
                self.writer.add_scalar(key, value, metrics["step"])

    def flush(self) -> None:
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
