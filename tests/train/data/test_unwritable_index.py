"""A sample index that nothing can write, and a corpus whose index does not cover its sequences."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longcat.errors import ConfigError
from tests.support.corpora import unique_documents, write_corpus
from train.data import epochs
from train.data.config import DataConfig
from train.data.samples import TokenSamples


def samples_of(prefix: str, cache: Path) -> TokenSamples:
    config = DataConfig("n", "s", paths=[prefix], validation_fraction=0.1)
    return TokenSamples(config, sequence_length=16, seed=3, vocab_size=1 << 20, split="train", cache_dir=cache)


def test_full_disk_keeps_the_sample_index_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An index is built at the first validation and at each new epoch: a full disk then must not end the run."""
    prefix = write_corpus(tmp_path / "corpus", unique_documents(60, 0))
    wanted = samples_of(prefix, tmp_path / "space")

    def full(*_: Any) -> bool:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(epochs, "publish_index", full)
    found = samples_of(prefix, tmp_path / "full")
    for number in (0, 1, found.num_samples + 1):  # the last one is of the second epoch
        np.testing.assert_array_equal(found[number], wanted[number])
    assert "cannot be written (No space left on device)" in capsys.readouterr().err


def test_index_must_cover_every_sequence(tmp_path: Path) -> None:
    prefix = write_corpus(tmp_path / "corpus", unique_documents(21, 0))
    index = Path(f"{prefix}.idx")
    index.write_bytes(index.read_bytes()[:-8] + struct.pack("<q", 20))
    with pytest.raises(ConfigError, match="its documents do not follow each other"):
        samples_of(prefix, tmp_path / "cache")
