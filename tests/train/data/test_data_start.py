"""A run that starts from another run's checkpoint with other data: refused, or read from its first sample."""

from __future__ import annotations

import email
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.support.running import NARROW, VOCAB, exit_json, lines, train_here
from train.checkpoint.manifest import STATE, list_checkpoints
from train.compose import compose
from train.data.build import build
from train.data.samples import TokenSamples
from train.read_ahead import ReadAhead


@pytest.fixture(scope="module")
def other(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Path prefix of a corpus of other text with the same tokenizer."""
    text, out = tmp_path_factory.mktemp("text"), tmp_path_factory.mktemp("other")
    for number, source in enumerate(sorted((Path(email.__file__).parent / "mime").glob("*.py"))):
        (text / f"{number:03}.txt").write_text(source.read_text())
    tokenizer = corpus.parent / "tokenizer.json"
    build(compose([f"data.source={text}", f"data.out={out}", f"data.tokenizer={tokenizer}"]).data, VOCAB)
    return out / "corpus"


@pytest.fixture
def words(overrides: list[str]) -> list[str]:
    """Overrides of a run of 3 steps of 4 samples with a checkpoint of the last."""
    words = [*overrides, *NARROW]
    assert train_here([*words, "train.steps=3"]) == 0
    return words


@pytest.fixture
def branch(words: list[str], tmp_path: Path) -> list[str]:
    """Overrides of a run that starts from that checkpoint."""
    return [*words, "train.steps=8", "run.name=branch", f"checkpoint.resume={tmp_path / 'run'}"]


def stages(*starts: int) -> str:
    return f"data.stages=[{','.join(f'{{start_tokens:{start},weights:[1.0]}}' for start in starts)}]"


@pytest.mark.parametrize(
    "change",
    ["train.sequence_length=16", "data.weights=[2]", "data.validation_fraction=0.3", stages(64)],
)
def test_another_order_of_samples_is_refused(change: str, branch: list[str], tmp_path: Path) -> None:
    assert train_here([*branch, change]) == 2
    said = exit_json(tmp_path / "branch")["message"]
    assert change.partition("=")[0] in said and "is at sample 12 of other data" in said
    assert "set them equal" in said and "data.from_start=true" in said
    assert not list_checkpoints(tmp_path / "branch" / "checkpoints")


def test_another_corpus_is_refused_under_any_name(
    branch: list[str], other: Path, words: list[str], corpus: Path, tmp_path: Path
) -> None:
    assert train_here([*branch, f"data.paths=[{other}]"]) == 2
    assert f"data.paths was ['{corpus}'] and is now ['{other}']" in exit_json(tmp_path / "branch")["message"]
    moved = shutil.copytree(other.parent, tmp_path / "moved") / "corpus"
    assert train_here([*words, f"data.paths=[{moved}]", "run.name=first", "train.steps=3"]) == 0
    shutil.rmtree(moved.parent)
    shutil.copytree(corpus.parent, moved.parent, ignore=shutil.ignore_patterns("uninterrupted"))
    words = [*words, f"data.paths=[{moved}]", f"checkpoint.resume={tmp_path / 'first'}", "run.name=second"]
    assert train_here([*words, "train.steps=8"]) == 2
    assert "a corpus of other contents" in exit_json(tmp_path / "second")["message"]


def test_compatible_data_changes_resume_at_the_next_sample(branch: list[str], corpus: Path, tmp_path: Path) -> None:
    """A corpus that has moved, and a stage that begins with the next sample."""
    moved = (
        shutil.copytree(corpus.parent, tmp_path / "moved", ignore=shutil.ignore_patterns("uninterrupted")) / "corpus"
    )
    assert train_here([*branch, f"data.paths=[{moved}]", stages(12 * 32)]) == 0
    assert [row["first_sample"] for row in lines(tmp_path / "branch")] == [12, 16, 20, 24, 28]


def test_new_data_starts_at_its_first_sample(
    branch: list[str], other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often the run is interrupted."""
    read: list[tuple[int, bytes]] = []
    get = TokenSamples.__getitem__

    def remember(self: TokenSamples, index: int) -> Any:
        window = get(self, index)
        read.append((index, window.tobytes()))
        return window

    monkeypatch.setattr(TokenSamples, "__getitem__", remember)
    monkeypatch.setattr(ReadAhead, "ask", lambda self, numbers: None)  # what is noted is what is trained on
    longer = [*branch, "train.sequence_length=64", f"data.paths=[{other}]", "data.from_start=true"]
    config = compose(longer)
    fresh = TokenSamples(
        config.data, sequence_length=64, seed=0, vocab_size=VOCAB, split="train", cache_dir=tmp_path / "index"
    )
    expected = [(number, get(fresh, number).tobytes()) for number in range(20)]

    assert train_here([*longer, "run.name=straight"]) == 0
    assert read == expected, "8 - 3 steps of 4 samples"
    read.clear()
    assert train_here([*longer, "train.steps=5"]) == 0
    counters = json.loads((tmp_path / "branch" / "checkpoints" / "step-00000005" / STATE).read_text())["counters"]
    assert counters == {"step": 5, "samples": 20, "tokens": 3 * 128 + 2 * 256, "data_start": 12}
    assert train_here([*longer, "train.steps=6"]) == 0
    assert train_here([word for word in longer if "checkpoint.resume" not in word]) == 0
    assert read == expected
    rows, straight = (
        [json.loads(line, parse_float=str) for line in (tmp_path / name / "metrics.jsonl").open()]
        for name in ("branch", "straight")
    )
    assert [row["first_sample"] for row in rows] == [0, 4, 8, 12, 16]
    assert [(row["loss"], row["state_hash"]) for row in rows] == [(row["loss"], row["state_hash"]) for row in straight]


def test_third_run_resumes_in_the_second_run_s_data(branch: list[str], tmp_path: Path) -> None:
    """Without data.from_start; with it the third run starts at its first sample too."""
    longer = [*branch, "train.sequence_length=64", "train.steps=5"]
    assert train_here([*longer, "data.from_start=true"]) == 0
    third = [*longer, f"checkpoint.resume={tmp_path / 'branch'}", "train.steps=6"]
    assert train_here([*third, "run.name=third"]) == 0
    assert [row["first_sample"] for row in lines(tmp_path / "third")] == [8]
    assert train_here([*third, "run.name=anew", "data.from_start=true"]) == 0
    assert [row["first_sample"] for row in lines(tmp_path / "anew")] == [0]


def test_checkpoint_without_this_counter_resumes(words: list[str], branch: list[str], tmp_path: Path) -> None:
    """It has no counter, and identifies its corpora by path alone."""
    from train.checkpoint.files import file_hash
    from train.checkpoint.manifest import MANIFEST

    folder = tmp_path / "run" / "checkpoints" / "step-00000003"
    state = json.loads((folder / STATE).read_text())
    del state["counters"]["data_start"], state["configuration"]["corpora"]
    (folder / STATE).write_text(json.dumps(state))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][STATE] = file_hash(folder / STATE)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    assert train_here([*branch, "train.steps=4"]) == 0
    assert [row["first_sample"] for row in lines(tmp_path / "branch")] == [12]
    assert train_here([*branch, "run.name=wrong", "train.sequence_length=16"]) == 2
