"""A finding of silent data corruption: what differs, who is suspected, as one sentence and as data for exit.json."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from longcat.errors import CorruptionError


@dataclass(frozen=True)
class Site:
    """A rank and the hardware that it runs on."""

    rank: int
    host: str
    device: str
    node: str | None = None  # under Slurm, its name for the host: what sbatch --exclude takes

    @classmethod
    def here(cls, rank: int, device: torch.device) -> Site:
        """This process's."""
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        number = f" {device.index}" if device.index is not None else ""
        return cls(rank, socket.gethostname(), f"{name}{number}", os.environ.get("SLURMD_NODENAME"))

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, {self.device})"


@dataclass(frozen=True)
class Finding:
    """Something that should be bitwise equal and is not."""

    kind: str  # a row of the table in docs/guide/corruption.md
    step: int  # the step in which it was noticed; its update was not applied
    what: str  # the tensor, transfer or operator that differs, as a reader knows it
    suspects: tuple[int, ...]  # ranks of which one is at fault, the likeliest first
    layer: int | None = None
    operator: str = ""
    tensor: str = ""
    detail: str = ""  # a clause that says what was compared
    since: int | None = None  # the first step that a fault which lasts may have changed, unseen

    def error(self, sites: Sequence[Site]) -> CorruptionError:
        """The error that ends the run; ``sites`` are all ranks', in rank order."""
        suspected = [sites[rank] for rank in self.suspects]
        named = " or ".join(map(str, suspected[:4])) + (f" or {len(suspected) - 4} more" if len(suspected) > 4 else "")
        message = f"silent data corruption in step {self.step}: {self.what} on {named} {self.detail}"
        first = suspected[0]
        finding: dict[str, Any] = asdict(self) | asdict(first) | {"suspects": [asdict(site) for site in suspected]}
        return CorruptionError(message, finding)


def layer_of(name: str) -> int | None:
    """The layer in a tensor's or an event's name; None if it is in none."""
    found = re.search(r"layers?[. ](\d+)", name)
    return int(found[1]) if found else None
