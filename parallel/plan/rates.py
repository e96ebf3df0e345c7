"""How fast a device computes: the time of one operator by its products and the bytes that it reads and writes."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rates:
    """Speeds that a rank reaches in practice; data sheets state higher ones."""

    bfloat16: float  # FLOP/s of matrix products
    float32: float
    memory: float  # bytes per second that an operator reads and writes
    call: float = 0.0  # seconds that an operator takes at least

    def seconds(self, flops: float, num_bytes: float, dtype: torch.dtype) -> float:
        """Products and memory traffic overlap: the slower of the two counts."""
        rate = self.bfloat16 if dtype in (torch.bfloat16, torch.float16) else self.float32
        return max(flops / rate, num_bytes / self.memory, self.call)


NO_TIME = Rates(float("inf"), float("inf"), float("inf"))
