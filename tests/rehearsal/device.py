"""A CUDA device that is not there: the library that torch asks in its place, and stand-ins for calls of `torch.cuda`.

`load` must run before torch is imported, so a rehearsal has a process of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import patch

SOURCE = Path(__file__).with_name("stand_in.cpp")


def build() -> Path:
    """The compiled stand-in; compiled anew (2 s) when its source or torch has changed."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch_folder = Path(spec.origin).parent
    version = (torch_folder / "version.py").read_bytes()
    name = hashlib.sha256(SOURCE.read_bytes() + version + str(torch_folder).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"longcat-rehearsal-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    library = folder / f"{name}.so"
    if not library.exists():
        partial = folder / f"{name}.{os.getpid()}.partial"
        paths = [f"-I{torch_folder}/include", f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib"]
        options = ["-std=c++20", "-shared", "-fPIC", "-O0", "-Wl,--no-as-needed", "-lc10", "-ltorch_cpu"]
        subprocess.run(["g++", str(SOURCE), "-o", str(partial), *paths, *options], check=True)
        partial.rename(library)
    return library


def load() -> None:
    """Give torch, which is imported next, the stand-in for CUDA."""
    ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)


@contextmanager
def calls_of_cuda(synchronized: Callable[[str], None]) -> Iterator[None]:
    """Let `torch.cuda` have streams, events and the properties of an H100; tell of every wait for the device."""
    import torch

    class Stream(torch.Stream):
        def __new__(cls, device: Any = None, priority: int = 0, **_: Any) -> Any:
            return super().__new__(cls, device="cuda:0", priority=priority)

        def synchronize(self) -> None:
            synchronized("stream")

    class Event(torch.Event):
        def __new__(cls, enable_timing: bool = False, **_: Any) -> Any:
            return super().__new__(cls, device="cuda:0", enable_timing=False)

        def synchronize(self) -> None:
            synchronized("event")

    instead: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "current_stream": lambda device=None: torch.accelerator.current_stream("cuda:0"),
        "default_stream": lambda device=None: torch.Stream(stream_id=0, device_index=0, device_type=1),
        "stream": lambda stream: stream,
        "synchronize": lambda device=None: synchronized("device"),
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "is_current_stream_capturing": lambda: False,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_rng_state": lambda device=None: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
    }
    with patch.multiple(torch.cuda, **instead):
        yield
