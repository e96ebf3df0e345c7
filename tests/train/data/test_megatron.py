"""What importing Megatron-core's data sets brings along."""

import subprocess
import sys

import pytest

OURS_FIRST = """
import sys
import train.data.megatron as ours
assert "wandb" not in sys.modules, "wandb"
assert "torch._inductor.compile_fx" not in sys.modules, "torch's compiler"
import megatron.core
from megatron.core.datasets.gpt_dataset import GPTDataset
assert megatron.core.utils and megatron.core.tensor_parallel and megatron.core.__version__
assert megatron.core.DistributedDataParallel
assert GPTDataset is ours.GPTDataset
"""
NEEDS_MORE = """
import importlib, sys
plain = importlib.import_module
missing = {"megatron.core.datasets.utils": "megatron.core.nothing"}
importlib.import_module = lambda name, *rest, **more: plain(missing.get(name, name), *rest, **more)
import train.data.megatron as ours
import megatron.core
assert megatron.core.parallel_state and megatron.core.__version__
assert megatron.core.datasets.gpt_dataset.GPTDataset is ours.GPTDataset
"""
THEIRS_FIRST = """
import sys
import megatron.core
import train.data.megatron as ours
assert sys.modules["megatron.core"] is megatron.core
assert megatron.core.datasets.gpt_dataset.GPTDataset is ours.GPTDataset
"""


PROGRAMS = {"ours_first": OURS_FIRST, "theirs_first": THEIRS_FIRST, "needs_more": NEEDS_MORE}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_data_sets_come_alone_and_leave_the_package_whole(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
