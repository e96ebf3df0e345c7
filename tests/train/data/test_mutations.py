"""Changed bytes in corpora and sample indexes are refused or repaired, never read in silence."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.support.mutations import survive_mutations
from train.data.build import build
from train.data.config import DataConfig
from train.data.ids import check_ids
from train.data.samples import TokenSamples
from train.data.tokens import token_byte_lengths

VOCABULARY, LENGTH = 300, 64


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a built corpus of several blocks, and of nothing else."""
    folder = tmp_path_factory.mktemp("mutations")
    rows = [json.dumps({"text": f"Document {i}: {'word ' * (i % 7)} {i * 7919 % 1000} é"}) for i in range(40)]
    digits = "".join(str(number) for number in range(10_000))  # one token each
    rows.append(json.dumps({"text": digits}))
    (folder / "text.jsonl").write_text("\n".join(rows))
    build(DataConfig("x", str(folder / "text.jsonl"), out=str(folder / "corpus")), VOCABULARY)
    (folder / "text.jsonl").unlink()
    assert (folder / "corpus" / "corpus.bin").stat().st_size > 1 << 16, "several blocks"
    return folder


def read_all(folder: Path) -> str:
    """A hash of every training and validation sample, their documents and the bytes of the validation text."""
    config = DataConfig("x", "s", paths=[str(folder / "corpus" / "corpus")], validation_fraction=0.2)
    digest = hashlib.sha256()
    check_ids(config.paths, VOCABULARY, [folder / "index"])
    for split in ("train", "validation"):
        samples = TokenSamples(
            config,
            sequence_length=LENGTH,
            seed=1,
            vocab_size=VOCABULARY,
            split=split,  # type: ignore[arg-type]
            cache_dir=folder / "index",
        )
        for number in range(samples.num_samples):
            digest.update(samples.with_documents(number).tobytes())
        digest.update(str(samples.num_samples).encode())
    digest.update(token_byte_lengths(folder / "corpus" / "tokenizer.json", VOCABULARY).tobytes())
    return digest.hexdigest()


def check(folder: Path, count: int, seed: int) -> None:
    found = survive_mutations(folder, lambda: read_all(folder), count, seed)
    for name in ("corpus.bin", "corpus.idx", "corpus.xxh3", "corpus.json", "tokenizer.json"):
        assert found[f"{name} refused"], f"no change of {name} was noticed"
    for name in ("documents.npy", "samples.npy", "shuffle.npy", "index.json"):
        assert found[f"{name} same"] and not found[f"{name} refused"], f"{name} is not built again"
    for name in ("corpus.bin", "corpus.idx", "corpus.xxh3", "tokenizer.json"):
        assert not found[f"{name} same"], f"a change of {name} was not noticed"


def test_changed_bytes_are_refused_or_repaired(corpus: Path) -> None:
    check(corpus, 100, 0)


@pytest.mark.long
def test_ten_thousand_changes_are_refused_or_repaired(corpus: Path) -> None:
    """About an hour."""
    check(corpus, 10_000, 1)
