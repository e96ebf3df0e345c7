"""Megatron-core's data sets, without the rest of its package.

`import megatron.core` runs megatron's model and inference code: 4 seconds, torch's compiler, wandb and 100 MB, of which
reading data needs nothing. So its `__init__` is left out while the data sets are imported, and no trace of that
remains: a later `import megatron.core` runs it.
"""

from __future__ import annotations

import sys
import warnings
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec

_CORE = "megatron.core"


def _bare_package() -> None:
    """Put an empty package where megatron.core is searched for: with its folders, without its code."""
    megatron = find_spec("megatron")
    found = megatron and PathFinder.find_spec(_CORE, megatron.submodule_search_locations)
    if not found or found.submodule_search_locations is None:
        raise ModuleNotFoundError(f"No module named {_CORE!r}", name=_CORE)
    bare = ModuleSpec(_CORE, None, is_package=True)
    bare.submodule_search_locations = found.submodule_search_locations
    sys.modules[_CORE] = module_from_spec(bare)


_is_bare = _CORE not in sys.modules
if _is_bare:
    _bare_package()
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of optional GPU packages that reading data does not need
        import megatron.core.parallel_state  # noqa: F401 (first, since it and megatron.core.utils import each other)
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
        from megatron.core.datasets.helpers import build_blending_indices
        from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
        from megatron.core.datasets.utils import Split
finally:
    if _is_bare:
        del sys.modules[_CORE]

__all__ = [
    "GPTDataset",
    "GPTDatasetConfig",
    "IndexedDataset",
    "IndexedDatasetBuilder",
    "Split",
    "build_blending_indices",
]
