"""How long a GPU's compute stream waits for other ranks, which the host does not see. Never run on a GPU."""

from __future__ import annotations

import torch

from parallel.watchdog.spans import SPANS


class CudaClock:
    """Two CUDA events around each wait: the time between them is how long the stream waited.

    Waits on other streams (FSDP2's copies and reductions) are not the compute stream's and do not count.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pairs: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self.free: list[torch.cuda.Event] = []
        self.begun: torch.cuda.Event | None = None

    def enter(self) -> None:
        stream = torch.cuda.current_stream(self.device)
        if stream == torch.cuda.default_stream(self.device):
            self.begun = self._event()
            self.begun.record(stream)

    def leave(self) -> None:
        if self.begun is not None:
            end = self._event()
            end.record(torch.cuda.default_stream(self.device))
            self.pairs.append((self.begun, end))
            self.begun = None

    def take(self) -> float:
        if not self.pairs:
            return 0.0
        self.pairs[-1][1].synchronize()
        seconds = sum(begin.elapsed_time(end) for begin, end in self.pairs) / 1e3
        self.free += [event for pair in self.pairs for event in pair]
        self.pairs = []
        return seconds

    def _event(self) -> torch.cuda.Event:
        return self.free.pop() if self.free else torch.cuda.Event(enable_timing=True)


def count_stream_waits(device: torch.device) -> None:
    """Measure blocked seconds on the compute stream where the device has one."""
    SPANS.stream_clock = CudaClock(device) if device.type == "cuda" else None
