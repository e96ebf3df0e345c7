"""What a start does not import: torch's compiler and packages of other commands cost seconds of every rank."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.support.running import TINY

UNUSED = ("torch._dynamo", "torch._inductor", "datasets", "transformers", "pandas", "deepspeed", "matplotlib", "wandb")
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


def test_training_imports_no_compiler(corpus: Path, tmp_path: Path) -> None:
    words = [*TINY, "model.vocab_size=512", f"data.paths=[{corpus}]", f"run.dir={tmp_path}", "logging.wandb=disabled"]
    code, modules = loaded_by(TRAIN, [*words, "train.steps=2"])
    assert code == 0
    assert not modules.intersection(UNUSED), "a start imports what it does not use"
