"""Megatron-core's data sets, without the rest of its package.

`import megatron.core` runs megatron's model and inference code: 4 seconds, torch's compiler, wandb and 100 MB, of which
reading data needs nothing. So its `__init__` is put off until somebody asks for something that it defines.
"""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Any

_CORE = "megatron.core"
_DATA_SETS = (
    "parallel_state",  # first, since it and megatron.core.utils import each other
    "datasets.gpt_dataset",
    "datasets.helpers",
    "datasets.indexed_dataset",
    "datasets.utils",
)


class _DeferredPackage(ModuleType):
    """A package whose `__init__` runs when a name is asked for that is no imported submodule."""

    __getattr__: Any

    def run_when_needed(self) -> None:
        def run(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            del self.__dict__["__getattr__"]
            assert self.__spec__ is not None and self.__spec__.loader is not None
            self.__spec__.loader.exec_module(self)
            return getattr(self, name)

        self.__dict__["__getattr__"] = run


def _import_data_sets() -> None:
    """Import the data sets into a package whose `__init__` is put off; where that fails, forget the attempt."""
    megatron = find_spec("megatron")
    spec = megatron and PathFinder.find_spec(_CORE, megatron.submodule_search_locations)
    if not spec:
        return
    package = module_from_spec(spec)
    package.__class__ = _DeferredPackage
    assert isinstance(package, _DeferredPackage)
    sys.modules[_CORE] = package
    setattr(import_module("megatron"), "core", package)  # noqa: B010 (as an import would)
    try:
        for name in _DATA_SETS:
            import_module(f"{_CORE}.{name}")
    except (ImportError, AttributeError):  # another version needs more of its package: import all of it
        for name in [one for one in sys.modules if one == _CORE or one.startswith(f"{_CORE}.")]:
            del sys.modules[name]
    else:
        package.run_when_needed()


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it warns of optional GPU packages that reading data does not need
    if _CORE not in sys.modules:
        _import_data_sets()
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.helpers import build_blending_indices
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
    from megatron.core.datasets.utils import Split

__all__ = [
    "GPTDataset",
    "GPTDatasetConfig",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "Split",
    "build_blending_indices",
]
