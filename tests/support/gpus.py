"""Whether tests may see GPUs: gloo ranks and CPU figures must not, unless tests of GPUs were asked for."""

from __future__ import annotations

import re
from collections.abc import MutableMapping


def hide_gpus(environment: MutableMapping[str, str], marks: str) -> None:
    """Hide all GPUs from torch and from programs that tests start, unless ``-m`` asks for those marked `gpu`."""
    if re.search(r"(?<!not )\bgpu\b", marks) is None:
        environment["CUDA_VISIBLE_DEVICES"] = ""
