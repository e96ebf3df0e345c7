"""`overlap.num_chunks=auto` in runs: the bits of the number it chose, which stands over a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from parallel.chunks import ChunkChoice, LayerTimes
from tests.support.running import NARROW, exact, train_two
from train.chunks import decide_num_chunks, measure_num_chunks
from train.compose import compose
from train.run_dir.folder import read_config
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


@pytest.fixture
def decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Any, list[str]]]:
    """Decides where 2 was measured with ep 2, or nothing where it overlaps nothing; returns number and notes.

    Args:
        words: of the configuration.
        checkpoint: `(number, ep)` of the checkpoint, if there is one.
        described: the same of config.yaml.
    """
    monkeypatch.setattr("train.chunks.broadcast", lambda value: value)

    def decide(
        words: list[str], checkpoint: tuple[int, int] | None = None, described: tuple[int, int] | None = None
    ) -> tuple[Any, list[str]]:
        config = compose(["overlap.num_chunks=auto", "parallel.ep=2", f"run.dir={tmp_path}", "run.name=mine", *words])
        config.run.folder.mkdir()
        for name, of in (("state.json", checkpoint), ("config.yaml", described)):
            if of is not None:
                stored = {"overlap": {"num_chunks": of[0]}, "parallel": {"ep": of[1]}}
                text = json.dumps({"configuration": stored} if name == "state.json" else stored)
                (config.run.folder / name).write_text(text)
        overlaps = config.parallel.ep > 1 and config.overlap.enabled
        measured = ChunkChoice(2, LayerTimes(1.0, 0.0, 1.0, 0.0, 1.0, 1.0), 1e9, 1e9) if overlaps else None
        if measured is None:
            topology: Any = SimpleNamespace(sizes=SimpleNamespace(ep=config.parallel.ep))
            assert measure_num_chunks(config, topology) is None
        notes: list[str] = []
        terminal = SilentTerminal()
        terminal.note = notes.append  # type: ignore[method-assign, assignment]
        state: Any = SimpleNamespace(models=[])
        decide_num_chunks(measured, state, config, None if checkpoint is None else config.run.folder, terminal)
        return config.overlap.num_chunks, notes

    return decide


BLOCKING = ["overlap.enabled=false"]


@pytest.mark.parametrize(
    ("words", "checkpoint", "described", "expected", "said"),
    [
        ([], (4, 2), None, 4, "4 stands, as in the checkpoint, though 2 was measured now"),
        (["train.deterministic=false"], (4, 2), (4, 2), 2, ""),
        ([], (4, 1), None, 2, "chose 2 by measurement"),
        (BLOCKING, (4, 2), None, 4, "4 stands, as in the checkpoint, though nothing overlaps now"),
        (BLOCKING, None, None, 1, ""),
        (["parallel.ep=1"], None, None, 1, ""),
        ([], None, (8, 2), 8, "8 stands, as in the config.yaml, though 2 was measured now"),
        ([], (4, 1), (8, 2), 8, "8 stands, as in the config.yaml"),
        ([], (4, 2), (8, 2), 4, "4 stands, as in the checkpoint"),
        ([], None, (8, 1), 2, "chose 2 by measurement"),
    ],
    ids=["kept", "free", "ep", "blocking", "new-blocking", "ep1", "no-save", "no-save-ep", "both", "other-ep"],
)
def test_number_that_a_run_has_stands(
    decided: Any, words: list[str], checkpoint: Any, described: Any, expected: int, said: str
) -> None:
    """While ep is the same: of the checkpoint, or before the first one of config.yaml."""
    number, notes = decided(words, checkpoint, described)
    assert number == expected
    assert len(notes) == bool(said) and said in "".join(notes)


@pytest.mark.parametrize("value", ["2.5", "many", "true", "0", "null"])
def test_other_values_are_refused(refused: Any, value: str) -> None:
    assert "overlap.num_chunks" in refused([f"overlap.num_chunks={value}"])
