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
assert megatron.core.parallel_state and megatron.core.__version__
assert GPTDataset is ours.GPTDataset
"""
THEIRS_FIRST = """
import sys
import megatron.core
import train.data.megatron as ours
assert sys.modules["megatron.core"] is megatron.core
assert megatron.core.datasets.gpt_dataset.GPTDataset is ours.GPTDataset
"""


@pytest.mark.parametrize("program", [OURS_FIRST, THEIRS_FIRST], ids=["ours_first", "theirs_first"])
def test_data_sets_come_alone_and_leave_the_package_whole(program: str) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
