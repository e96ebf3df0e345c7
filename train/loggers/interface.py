"""The interface of a metrics logger, several of them as one, and a guard for those that may fail."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from train.checkpoint.failures import describe
from train.run_dir.files import Note

if TYPE_CHECKING:
    from torch import Tensor


class MetricsSink(Protocol):
    """Takes the metrics of each step."""

    def write(self, metrics: dict[str, Any], counts: Tensor, biases: Tensor) -> None:
        """Selection counts [L, N+Z] and biases [L, N+Z] belong to the same step as ``metrics``."""

    def rewind(self, step: int) -> None:
        """The steps after ``step`` are trained again, on other samples: set what was written of them aside."""

    def flush(self) -> None:
        """Let readers of the run folder see all that was written so far, without waiting for a network."""

    def close(self) -> None:
        """Wait until all is written; raises what went wrong."""


class NullSink:
    """Writes nothing: the sink of every rank but the first, and the base class of loggers that need not all methods."""

    def write(self, metrics: dict[str, Any], counts: Tensor, biases: Tensor) -> None: ...

    def rewind(self, step: int) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class SinkGroup:
    """Several sinks as one."""

    def __init__(self, sinks: Sequence[MetricsSink]) -> None:
        self.sinks = sinks

    def write(self, metrics: dict[str, Any], counts: Tensor, biases: Tensor) -> None:
        for sink in self.sinks:
            sink.write(metrics, counts, biases)

    def rewind(self, step: int) -> None:
        for sink in self.sinks:
            sink.rewind(step)

    def flush(self) -> None:
        for sink in self.sinks:
            sink.flush()

    def close(self) -> None:
        for sink in self.sinks:
            sink.close()


class Guarded:
    """A sink that others can do without: at its first error it is noted and left out, and training continues.

    Args:
        name: of the sink, for the note.
        make: makes it; that may fail too.
    """

    def __init__(self, name: str, make: Callable[[], MetricsSink], note: Note) -> None:
        self.name, self.note = name, note
        self.sink: MetricsSink | None = None
        self._try(lambda: setattr(self, "sink", make()))

    def write(self, metrics: dict[str, Any], counts: Tensor, biases: Tensor) -> None:
        if (sink := self.sink) is not None:
            self._try(lambda: sink.write(metrics, counts, biases))

    def rewind(self, step: int) -> None:
        if (sink := self.sink) is not None:
            self._try(lambda: sink.rewind(step))

    def flush(self) -> None:
        if (sink := self.sink) is not None:
            self._try(lambda: sink.flush())

    def close(self) -> None:
        if (sink := self.sink) is not None:
            self._try(lambda: sink.close())

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self.sink = None
            self.note(f"{self.name}: {describe(error)}; training continues without {self.name}")
