"""`overlap.num_chunks=auto` in runs: the bits of the number it chose, which stands over a resume."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parallel.chunks import ChunkChoice, LayerTimes
from tests.support.running import NARROW, exact, train_two
from train.chunks import decide_num_chunks, measure_num_chunks
from train.compose import compose
from train.run_dir import read_config
from train.terminal import SilentTerminal

EP2 = ["model=debug", "model.vocab_size=512", *NARROW, "train.sequence_length=16", "train.dtype=float32"]
EP2 += ["parallel.ep=2", "validation.every=0", "validation.documents=0", "logging.wandb=disabled"]
EP2 += ["logging.hash_every=1", "checkpoint.every=1"]


def test_auto_has_the_bits_of_its_number_and_keeps_it(corpus: Path, tmp_path: Path) -> None:
    words = [*EP2, f"data.paths=[{corpus}]", f"run.dir={tmp_path}", "train.steps=2"]
    auto = [*words, "run.name=auto", "overlap.num_chunks=auto"]
    assert train_two([*auto, "train.steps=1"], auto) == [0, 0]
    stored = read_config(tmp_path / "auto")
    number = stored["overlap"]["num_chunks"]
    assert number in (1, 2, 4, 8) and stored["derived"]["chunks"]["link_gb_per_second"] > 0
    state = json.loads((tmp_path / "auto/checkpoints/step-00000002/state.json").read_text())
    assert state["configuration"]["overlap"]["num_chunks"] == number
    assert "overlap.num_chunks=auto chose" in (tmp_path / "auto/run.log").read_text()
    assert train_two([*words, "run.name=plain", f"overlap.num_chunks={number}"]) == [0]
    assert exact(tmp_path / "auto") == exact(tmp_path / "plain")


@pytest.mark.parametrize(
    ("deterministic", "ep", "expected"), [("true", 2, 4), ("false", 2, 2), ("true", 1, 2)], ids=["kept", "free", "ep"]
)
def test_number_of_the_checkpoint_stands(tmp_path: Path, deterministic: str, ep: int, expected: int) -> None:
    """It was 4 under ``ep``, and now 2 is measured with ep 2."""
    config = compose(["overlap.num_chunks=auto", "parallel.ep=2", f"train.deterministic={deterministic}"])
    stored = {"configuration": {"overlap": {"num_chunks": 4}, "parallel": {"ep": ep}}}
    (tmp_path / "state.json").write_text(json.dumps(stored))
    measured = ChunkChoice(2, LayerTimes(1.0, 0.0, 1.0, 0.0, 1.0, 1.0), 1e9, 1e9)
    notes: list[str] = []
    terminal = SilentTerminal()
    terminal.note = notes.append  # type: ignore[method-assign, assignment]
    state: Any = SimpleNamespace(models=[])
    decide_num_chunks(measured, state, config, tmp_path, terminal)
    assert config.overlap.num_chunks == expected
    assert any("4 stands, as in the checkpoint" in note for note in notes) == (expected == 4)


@pytest.mark.parametrize("words", [[], ["parallel.ep=2", "overlap.enabled=false"]], ids=["ep1", "blocking"])
def test_nothing_to_choose_is_one_chunk(words: list[str]) -> None:
    config = compose(["overlap.num_chunks=auto", *words])
    topology: Any = SimpleNamespace(sizes=SimpleNamespace(ep=config.parallel.ep))
    assert measure_num_chunks(config, topology) is None and config.overlap.num_chunks == 1


@pytest.mark.parametrize("value", ["2.5", "many", "true", "0", "null"])
def test_other_values_are_refused(refused: Any, value: str) -> None:
    assert "overlap.num_chunks" in refused([f"overlap.num_chunks={value}"])
