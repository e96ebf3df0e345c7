"""Files of the run folder that cannot be written: training continues, says so once, and leaves no torn line."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import train.run_dir.files
from longcat.errors import ConfigError
from tests.support.running import NARROW, exit_json, lines, train_here
from train.compose import compose
from train.loggers.jsonl import JsonLines
from train.run_dir.exit_file import claim_exit, recorded_code
from train.run_dir.files import LineFile, write_file
from train.run_dir.folder import check_folder


@contextmanager
def size_limit(num_bytes: int) -> Iterator[None]:
    """No file may grow beyond ``num_bytes``, as by `ulimit -f`."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_loses_no_line_and_tears_none(tmp_path: Path) -> None:
    """Half of a line fits: it is taken out, waits in memory and is written when there is space."""
    notes: list[str] = []
    file = LineFile(tmp_path / "metrics.jsonl", notes.append)
    file.write("0123456789")
    with size_limit(15):
        for number in range(3):
            file.write(f"line {number}, too long to fit")
        assert (tmp_path / "metrics.jsonl").read_text() == "0123456789\n"
    file.write("last")
    file.close()
    written = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert written == ["0123456789", *(f"line {number}, too long to fit" for number in range(3)), "last"]
    assert [note.partition(": ")[0].partition(" is ")[0] for note in notes] == [
        f"{tmp_path / 'metrics.jsonl'} cannot be written",
        str(tmp_path / "metrics.jsonl"),
    ]
    assert "File too large; training continues" in notes[0] and notes[1].endswith("is written again")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE])
def test_each_error_of_a_disk_is_survived(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    file = LineFile(tmp_path / "log", notes.append)

    def fail(descriptor: int, data: bytes) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(train.run_dir.files.os, "write", fail)
        file.write("one")
        file.write("two")
    assert len(notes) == 1 and os.strerror(code) in notes[0]
    file.close()
    assert (tmp_path / "log").read_text() == "one\ntwo\n"


def test_lines_that_never_fit_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.run_dir.files, "MAX_PENDING_BYTES", 10)
    notes: list[str] = []
    with size_limit(0):
        file = LineFile(tmp_path / "log", notes.append)
        for number in range(5):
            file.write(f"line {number}")
        file.close()
    assert notes[-1] == f"{tmp_path / 'log'}: 5 lines could not be written and are lost"


def test_removed_file_is_made_again(tmp_path: Path) -> None:
    file = LineFile(tmp_path / "log", pytest.fail)
    file.write("one")
    (tmp_path / "log").unlink()
    file.write("two")
    file.close()
    assert (tmp_path / "log").read_text() == "two\n"


def test_half_a_line_of_a_crash_stays_apart(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("whole\nhal")
    file = LineFile(tmp_path / "log", pytest.fail)
    file.write("next")
    file.close()
    assert (tmp_path / "log").read_text() == "whole\nhal\nnext\n"


def test_whole_file_is_written_or_left_as_it_was(tmp_path: Path) -> None:
    notes: list[str] = []
    assert write_file(tmp_path / "text.json", "old", notes.append)
    with size_limit(100):
        assert not write_file(tmp_path / "text.json", "x" * 1000, notes.append)
    assert (tmp_path / "text.json").read_text() == "old" and len(notes) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.json"]


def block(folder: Path, *names: str) -> None:
    """Put folders where files should be: they cannot be opened for writing, also not by root."""
    for name in names:
        (folder / name).mkdir(parents=True)


BLOCKED = ("metrics.jsonl", "routing.jsonl", "run.log", "report.html", "text.json", "superseded.jsonl")


@pytest.mark.parametrize("name", [*BLOCKED, "traces", "config.yaml.partial", "wandb-run-id.txt"])
def test_run_ends_well_without_one_of_its_files(
    name: str, overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    if name == "traces":
        folder.mkdir()
        (folder / name).write_text("a file where a folder should be")
    else:
        block(folder, name)
    words = [*overrides, *NARROW, "train.steps=3", "validation.documents=1", "profile.steps=2"]
    assert train_here(words) == 0
    printed = capfd.readouterr().out
    said = {"traces": "no profile of step 2", "report.html": "no report", "config.yaml.partial": "config.yaml"}
    if name not in ("superseded.jsonl", "wandb-run-id.txt"):  # these two are not needed here
        assert printed.count(said.get(name, f"{folder / name} cannot be written")) >= 1, printed
    assert exit_json(folder)["code"] == 0
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    if name != "metrics.jsonl":
        assert [row["step"] for row in lines(folder)] == [1, 2, 3]


def test_full_disk_in_the_middle_is_made_up_for(
    overrides: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From step 3 to 5 seven bytes of a line can be written: the lines follow, and each is valid JSON."""
    folder, plain, plain_write = tmp_path / "run", JsonLines.write, os.write
    full = [False]

    def write(self: JsonLines, metrics: dict[str, Any], *rest: Any) -> None:
        full[0] = 3 <= metrics["step"] <= 5
        plain(self, metrics, *rest)
        full[0] = False

    def write_some(descriptor: int, data: bytes) -> int:
        if full[0] and not data.startswith(b'{"step"'):  # the rest of a line
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plain_write(descriptor, data[:7] if full[0] else data)

    monkeypatch.setattr(JsonLines, "write", write)
    monkeypatch.setattr(train.run_dir.files.os, "write", write_some)
    words = [*overrides, *NARROW, "train.steps=7", "logging.routing_every=1"]
    assert train_here(words) == 0
    printed = capfd.readouterr().out
    assert printed.count("metrics.jsonl cannot be written: No space left on device") == 1
    assert printed.count("metrics.jsonl is written again") == 1
    assert [row["step"] for row in lines(folder)] == list(range(1, 8))
    assert [json.loads(line)["step"] for line in (folder / "routing.jsonl").open()] == list(range(1, 8))


def spoil(folder: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    path = folder / name
    path.write_bytes(change(path.read_bytes()))


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def zeros(data: bytes) -> bytes:
    return bytes(len(data))


def with_junk(data: bytes) -> bytes:
    return b'[1]\n{"step": "3"}\n\xff\xfe\x00\n' + data + b'{"step": 1e999}\n{"step": null}\n' + b"[" * 20_000


@pytest.fixture(scope="module")
def finished(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with a checkpoint."""
    out = tmp_path_factory.mktemp("spoilt")
    assert train_here([*spoilt_words(corpus, out), "train.steps=4"]) == 0
    return out / "run"


def spoilt_words(corpus: Path, out: Path) -> list[str]:
    return [
        "model=debug", "model.vocab_size=512", "model.hidden_size=32", *NARROW, f"data.paths=[{corpus}]",
        "train.sequence_length=32", "train.global_batch_size=4", "validation.every=0", "validation.documents=1",
        "checkpoint.every=0", "logging.wandb=disabled", "logging.routing_every=1", f"run.dir={out}", "run.name=run",
    ]  # fmt: skip


@pytest.mark.parametrize("change", [half, zeros, with_junk, lambda data: b""], ids=["half", "zeros", "junk", "empty"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "routing.jsonl", "config.yaml", "exit.json", "text.json", "run.log"])
def test_spoilt_file_is_repaired_or_refused(
    name: str,
    change: Callable[[bytes], bytes],
    finished: Path,
    corpus: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A resume and a report end with 0, or with 2 and one line about the file; what they cannot read is kept."""
    from launch.__main__ import main as longcat

    folder = shutil.copytree(finished, tmp_path / "run")
    spoil(folder, name, change)
    capfd.readouterr()
    for words in (["report", str(folder)], ["train", *spoilt_words(corpus, tmp_path), "train.steps=6"]):
        code = longcat(words) if words[0] == "report" else train_here(words[1:])
        printed = capfd.readouterr()
        assert code in (0, 2), printed
        if code == 2:
            assert printed.err.count("\n") == 1 and name in printed.err
        assert "Traceback" not in printed.err
        if name == "metrics.jsonl" and words[0] == "train":
            assert code == 0 and "metrics.jsonl" in printed.out, "the loss of lines is not said"
            for line in (folder / name).read_text().splitlines():
                json.loads(line)
            assert [row["step"] for row in lines(folder)][-2:] == [5, 6]
            assert change(b"x") == b"" or (folder / "superseded.jsonl").stat().st_size


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_exit_is_claimed_once_without_links(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", refuse)
    assert claim_exit(tmp_path, 3, "stopped")
    assert not claim_exit(tmp_path, 1, "a consequence")
    assert recorded_code(tmp_path) == 3


def test_rank_keeps_its_code_where_nothing_can_be_written(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    assert claim_exit(gone, 4, "unhealthy"), "it prints the message itself"
    assert recorded_code(gone, 4) == 4
    assert recorded_code(gone) == 1


def test_checkpoints_that_cannot_be_made_are_refused(overrides: list[str], tmp_path: Path) -> None:
    """A link to a disk that is not mounted."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "not mounted")
    assert train_here([*overrides, *NARROW]) == 2
    assert "checkpoints cannot be made" in exit_json(tmp_path / "run")["message"]


def test_one_rank_of_a_machine_probes_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "touch", refuse)
    config = compose(["model=debug", f"run.dir={tmp_path}", "run.name=run"])
    monkeypatch.setenv("LOCAL_RANK", "1")
    check_folder(config)
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ConfigError, match="cannot write in"):
        check_folder(config)
