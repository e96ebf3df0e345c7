"""What a start does not import: torch's compiler and packages of other commands cost seconds of every rank."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longcat.garbage import import_without_collections
from parallel import environment
from tests.support.running import TINY
from train.compose import compose
from train.data.samples import TokenSamples
from train.samples import index_folders

UNUSED = ("torch._dynamo", "torch._inductor", "datasets", "transformers", "pandas", "deepspeed", "matplotlib", "wandb")
UNUSED += ("megatron", "triton")  # megatron where the sample index is not cached; it brings triton
TRAIN = """
import gc, json, sys
from train.__main__ import main
code = main(sys.argv[1:])
print(json.dumps([[code, gc.isenabled(), gc.get_freeze_count()], sorted(sys.modules)]))
"""


def loaded_by(script: str, arguments: list[str]) -> tuple[Any, set[str]]:
    """(exit code or codes, modules) of a new process that runs a script; it prints both as its last line."""
    command = [sys.executable, "-P", "-c", script, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    found, modules = json.loads(result.stdout.splitlines()[-1])
    return found, set(modules)


def test_training_imports_neither_compiler_nor_megatron(corpus: Path, tmp_path: Path) -> None:
    """Once the sample indexes are on disk; building them needs megatron-core. A mixture of two corpora."""
    words = [*TINY, "model.vocab_size=512", f"data.paths=[{corpus},{corpus}]", "data.weights=[2,1]"]
    words += [f"run.dir={tmp_path}", "logging.wandb=disabled"]
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
        assert all(len(samples[index]) == config.train.sequence_length + 1 for index in range(4))
    (code, collects, frozen), modules = loaded_by(TRAIN, [*words, "train.steps=2"])
    assert code == 0
    assert collects and frozen > 100_000, "the garbage collector looked through what the imports made"
    assert not modules.intersection(UNUSED), "a start imports what it does not use"


def test_a_later_run_of_a_process_keeps_no_garbage() -> None:
    """What a sweep's former run has left may be a model."""
    frozen = gc.get_freeze_count()
    with import_without_collections("train.run"):
        assert gc.isenabled()
    assert gc.get_freeze_count() == frozen


WRONG = {
    "ranks": ["run.num_processes=4", "parallel.dp=3"],
    "experts": ["run.num_processes=2", "parallel.ep=2", "model.num_experts=3"],
    "heads": ["run.num_processes=2", "parallel.tp=2", "model.num_heads=3"],
    "positions": ["run.num_processes=2", "parallel.cp=2", "train.sequence_length=30"],
    "stages": ["run.num_processes=2", "parallel.pp=2"],
    "DeepSpeed": ["run.num_processes=2", "parallel.pp=2", "parallel.sharding=zero1"],
    "bits": ["train.elastic_bits=3"],
    "memory": ["train.sequence_length=16777216", "train.global_batch_size=1048576"],
    "batch": ["run.num_processes=3"],
    "corpus": ["data.paths=[elsewhere/corpus]"],
}
REFUSED = """
import json, sys
from launch.__main__ import main as longcat
from train.__main__ import main as rank
common, cases = map(json.loads, sys.argv[1:])
codes = {}
for name, words in cases.items():
    codes[name] = longcat(["train", *common, *words])
    assert "torch" not in sys.modules, name
codes["check"] = longcat(["check", *common, *cases["ranks"]])
codes["rank"] = rank([*common, "parallel.tp=5"])
print(json.dumps([codes, sorted(sys.modules)]))
"""


def test_wrong_configurations_end_without_torch(corpus: Path, tmp_path: Path) -> None:
    """`longcat train`, `longcat check` and a rank of torchrun answer at once, where no GPU can be there."""
    common = [*TINY, "model.vocab_size=512", f"data.paths=[{corpus}]", f"run.dir={tmp_path}"]
    codes, modules = loaded_by(REFUSED, [json.dumps(common), json.dumps(WRONG)])
    assert codes == dict.fromkeys([*WRONG, "check", "rank"], 2)
    assert "torch" not in modules


def test_gpus_are_counted_without_torch_where_none_can_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A driver's file alone says nothing: then torch is asked, by the one question that does not start CUDA."""
    driver, asked = tmp_path / "nvidiactl", []
    fake = SimpleNamespace(device_count=lambda: asked.append("count") or 3)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=fake))
    monkeypatch.setattr(environment, "DRIVERS", (str(driver),))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert environment.count_gpus() == 0 and not asked
    driver.touch()
    assert environment.count_gpus() == 3 and asked
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert environment.count_gpus() == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert environment.count_gpus() == 3
