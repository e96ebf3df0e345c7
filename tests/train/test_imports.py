"""What a start does not import: torch's compiler and packages of other commands cost seconds of every rank."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.running import TINY
from train.compose import compose
from train.data.samples import TokenSamples
from train.run import index_folders

UNUSED = ("torch._dynamo", "torch._inductor", "datasets", "transformers", "pandas", "deepspeed", "matplotlib", "wandb")
UNUSED += ("megatron", "triton")  # megatron where the sample index is not cached; it brings triton
TRAIN = """
import json, sys
from train.__main__ import main
code = main(sys.argv[1:])
print(json.dumps([code, sorted(sys.modules)]))
"""


def loaded_by(script: str, arguments: list[str]) -> tuple[int, set[str]]:
    """(exit code, modules) of a new process that runs a script; it prints both as its last line."""
    command = [sys.executable, "-P", "-c", script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    code, modules = json.loads(result.stdout.splitlines()[-1])
    return code, set(modules)


def test_training_imports_neither_compiler_nor_megatron(corpus: Path, tmp_path: Path) -> None:
    """Once the sample index is on disk; building it needs megatron-core."""
    words = [*TINY, "model.vocab_size=512", f"data.paths=[{corpus}]", f"run.dir={tmp_path}", "logging.wandb=disabled"]
    config = compose(words)
    for split in ("train", "validation"):
        samples = TokenSamples(
            config.data,
            sequence_length=config.train.sequence_length,
            seed=config.train.seed,
            vocab_size=512,
            split=split,  # type: ignore[arg-type]
            cache_dir=index_folders(config)[0],
        )
        assert len(samples[0]) == config.train.sequence_length + 1
    code, modules = loaded_by(TRAIN, [*words, "train.steps=2"])
    assert code == 0
    assert not modules.intersection(UNUSED), "a start imports what it does not use"
