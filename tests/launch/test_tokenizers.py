"""A checkpoint records its tokenizer: training, export and generation refuse another one."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from launch.__main__ import main as longcat
from launch.generate import GenerateOptions, continuation, load
from tests.support.exporting import SMALL, run_command, trained
from tests.support.fixtures import Refused
from tests.support.running import lines, run_cleanly
from train.checkpoint.manifest import STATE
from train.checkpoint.offline_reader import Checkpoint
from train.compose import compose
from train.data.build import build
from train.data.corpus import file_sha256
from train.huggingface.export import ExportOptions, export


@pytest.fixture
def moved(corpus: Path, tmp_path: Path) -> Path:
    """A copy of the corpus for this test."""
    return (
        Path(shutil.copytree(corpus.parent, tmp_path / "corpus", ignore=shutil.ignore_patterns("uninterrupted")))
        / "corpus"
    )


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A corpus of another tokenizer of the same size."""
    (tmp_path / "text").mkdir()
    for number in range(60):
        (tmp_path / "text" / f"{number}.txt").write_text(" ".join(f"{word**3} brillig" for word in range(200)))
    build(compose([f"data.source={tmp_path / 'text'}", f"data.out={tmp_path / 'other'}"]).data, 300)
    return tmp_path / "other" / "corpus"


def test_corpus_of_another_tokenizer_is_refused_in_training(checkpoint: Path, other: Path, tmp_path: Path) -> None:
    """Also with data.from_start, because the same ids mean other text."""
    words = [*SMALL, f"data.paths=[{other}]", f"run.dir={tmp_path}", "run.name=run", f"checkpoint.resume={checkpoint}"]
    fragments = ["with the tokenizer of SHA-256", str(other), "longcat data build data.tokenizer=FILE"]
    assert run_cleanly(lambda: longcat(["train", *words, "data.from_start=true", "train.steps=3"])) == 2
    said = json.loads((tmp_path / "run" / "exit.json").read_text())["message"]
    assert all(word in said for word in fragments), said


def test_changed_tokenizer_file_is_refused_by_text_and_export(
    moved: Path, other: Path, corpus: Path, tmp_path: Path, refused: Refused
) -> None:
    source = f"source={trained(moved, tmp_path)}"
    (moved.parent / "tokenizer.json").write_bytes((other.parent / "tokenizer.json").read_bytes())
    target = f"target={tmp_path / 'out'}"
    fragments = [str(moved.parent / "tokenizer.json"), "is not the tokenizer", "name that one with"]
    refused(["generate", source, "max_tokens=2"], *fragments, "tokenizer=FILE")
    refused(["export", source, target], *fragments, "export.tokenizer=FILE")
    wrong = other.parent / "tokenizer.json"
    refused(["export", source, target, f"export.tokenizer={wrong}"], str(wrong), "is not the tokenizer")
    assert not (tmp_path / "out").exists()
    right = corpus.parent / "tokenizer.json"
    run_command("generate", source, "max_tokens=2", f"tokenizer={right}")
    run_command("export", source, target, f"export.tokenizer={right}")
    assert file_sha256(tmp_path / "out" / "tokenizer.json") == file_sha256(right)


def test_corpus_keeps_the_tokenizer_file_byte_for_byte(corpus: Path, tmp_path: Path) -> None:
    """An imported checkpoint matches the corpus however the tokenizer's JSON is formatted."""
    given = tmp_path / "given.json"
    given.write_text(json.dumps(json.loads((corpus.parent / "tokenizer.json").read_text()), indent=7))
    (tmp_path / "text").mkdir()
    for number in range(4):
        (tmp_path / "text" / f"{number}.txt").write_text("def main(): return 0\n" * 50)
    config = compose([f"data.source={tmp_path / 'text'}", f"data.out={tmp_path / 'out'}", f"data.tokenizer={given}"])
    assert build(config.data, 512).tokenizer_sha256 == file_sha256(given)


def test_commands_that_an_import_prints_work(
    checkpoint: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after balance.method=sign. With a corpus of another tokenizer, the import says to build one first."""
    run_command("export", f"source={checkpoint}", f"target={tmp_path / 'export'}", "export.dtype=float32")
    words = ["import", f"source={tmp_path / 'export'}", "balance.method=sign"]
    capsys.readouterr()
    run_command(*words, f"target={tmp_path / 'in'}", f"data.paths=[{corpus}]")
    _, command = capsys.readouterr().out.splitlines()
    known = json.loads((tmp_path / "in" / STATE).read_text())["configuration"]["tokenizer_sha256"]
    assert known == file_sha256(corpus.parent / "tokenizer.json")

    short = [word for word in SMALL if not word.startswith("model")] + [f"run.dir={tmp_path}", "train.steps=1"]
    program, *rest = shlex.split(command.replace("run.name=…", "run.name=first"))
    assert program == "longcat" and "balance.method=sign" in rest
    assert run_cleanly(lambda: longcat([*rest, *short])) == 0
    assert [row["step"] for row in lines(tmp_path / "first")] == [1]

    monkeypatch.chdir(tmp_path)  # where there is no corpus
    capsys.readouterr()
    run_command(*words, f"target={tmp_path / 'again'}")
    _, said, build_it, command = capsys.readouterr().out.splitlines()
    assert "must have the model's tokenizer" in said
    (tmp_path / "text").mkdir()
    for number in range(40):
        (tmp_path / "text" / f"{number}.txt").write_text("def main(): return 0\n" * 50)
    program, *rest = shlex.split(build_it.replace("=TEXTS", "=text").replace("=FOLDER", "=mine"))
    run_command(*rest)
    program, *rest = shlex.split(command.replace("run.name=…", "run.name=second").replace("=FOLDER", "=mine"))
    assert run_cleanly(lambda: longcat([*rest, *short])) == 0


def test_export_notes_tokens_that_training_left_out(
    moved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Clients would put `<|endoftext|>` before a text; the model never saw one there."""
    path = moved.parent / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    given = tmp_path / "given.json"
    tokenizer.save(str(given))
    checkpoint = trained(moved, tmp_path)
    options = ExportOptions(source=str(checkpoint), target=str(tmp_path / "out"))
    options.export.tokenizer = str(given)
    with patch.object(Checkpoint, "tokenizer", return_value=given):  # as if it were trained with that file
        _, notes = export(options)
    assert any("adds <|endoftext|> to a text" in note for note in notes)


def test_generation_asks_for_the_gpus_kernels(checkpoint: Path) -> None:
    with patch("launch.generate.install") as install:
        model, _, _ = load(GenerateOptions(source=str(checkpoint)))
    install.assert_called_once_with(next(model.parameters()).device)


def test_continuations_keep_their_first_space() -> None:
    """Decoded alone, tokens of a SentencePiece-like tokenizer lose it."""
    tokenizer = Tokenizer(models.WordLevel({"▁def": 0, "▁main": 1, "▁a": 2}))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    assert tokenizer.decode([1]) == "main"
    assert continuation(tokenizer, [0], [1, 2]) == " main a"
