"""Which of torch's operators have a kernel for CUDA, by the list from which torch generates its dispatcher.

A torch that is built for CPUs has no CUDA kernels to ask for; the list is in its wheel nevertheless.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

KEYS = ("CUDA", "CompositeExplicitAutograd", "CompositeExplicitAutogradNonFunctional", "CompositeImplicitAutograd")


@cache
def _functions() -> dict[str, bool]:
    """Each of aten's operators by its name and overload, and whether a CUDA tensor can be given to it."""
    import torchgen
    from torchgen.gen import parse_native_yaml
    from torchgen.model import DispatchKey

    folder = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native"
    parsed = parse_native_yaml(str(folder / "native_functions.yaml"), str(folder / "tags.yaml"))
    indices: list[Any] = [parsed.backend_indices[DispatchKey[key]] for key in KEYS]
    own = {str(one.func.name): any(index.has_kernel(one) for index in indices) for one in parsed.native_functions}
    return {
        str(one.func.name): own[str(one.func.name)]
        or (one.structured_delegate is not None and own[str(one.structured_delegate)])
        for one in parsed.native_functions
    }


def without_cuda_kernel(names: Iterable[str]) -> set[str]:
    """Those of aten's operators, as `aten::add.Tensor`, that have no kernel for CUDA."""
    known = _functions()
    return {name for name in names if name.startswith("aten::") and not known[name.removeprefix("aten::")]}
