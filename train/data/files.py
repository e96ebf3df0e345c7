"""Which files a `data.source` on this machine names: a folder, a file or a glob; their kind and their order."""

from __future__ import annotations

import glob
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from longcat.errors import ConfigError
from train.data.blocks import SUFFIX
from train.data.config import TOKENIZER_NAME
from train.data.corpus import INFO_NAME

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
_DATA = {".parquet": "parquet", ".txt": "text", ".text": "text"} | dict.fromkeys((".json", ".jsonl", ".ndjson"), "json")
_PROSE = dict.fromkeys((".md", ".rst", ".tex", ".py"), "text")  # in a folder of data they describe the data
_KNOWN = "parquet, json, jsonl, txt or md"
_CORPUS = ("corpus.bin", "corpus.idx", INFO_NAME)  # together in a folder they are a corpus that was built
_OF_CORPUS = (*_CORPUS, f"corpus{SUFFIX}", TOKENIZER_NAME)


@dataclass(frozen=True)
class SourceFiles:
    """Files of one kind (`parquet`, `json` or `text`) in the order in which they are read, and what was left out."""

    kind: str
    files: list[Path]
    left_out: str = ""  # what else is there, such as `.csv 3`; empty = nothing


def find_files(source: str) -> SourceFiles | None:
    """The files that ``source`` names; None if it names nothing on this machine.

    Names are taken as they are: only where nothing has exactly this name is ``source`` a glob.

    Raises:
        ConfigError: there are no files of a known kind, or files of several kinds, or one that cannot be read.
    """
    path, where = Path(os.path.expanduser(source)), f"data.source={source}"
    if os.path.isdir(path):
        return _in_folder(list(_below(path, where)), path, where)
    if os.path.lexists(path):
        return _of_one_kind([path], {}, path, where)
    if not glob.has_magic(source):
        return None
    found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True, include_hidden=True))]
    folders = [path for path in found if os.path.isdir(path)]
    files, others = _without_corpora([path for path in found if not os.path.isdir(path)])
    return _of_one_kind(files, {**others, **({"folders": len(folders)} if folders else {})}, path, where)


def kind_of(path: Path) -> str | None:
    """parquet, json or text by the suffix, that of a compression aside; None for others."""
    suffix = _suffix(path)
    return _DATA.get(suffix) or _PROSE.get(suffix)


def order_of(name: str) -> bytes:
    """Sorts files by a hash of their name, so that the first ones are a fair mixture of a folder."""
    return hashlib.sha256(os.fsencode(name)).digest()


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _below(folder: Path, where: str, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """All files below ``folder``, hidden ones and those behind links too; a link back to a folder above ends there."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ConfigError(f"{where}: {folder} cannot be read ({error.strerror}); give it read permission") from error
    for name in names:
        path = folder / name
        if os.path.isdir(path):
            yield from _below(path, where, (*above, real))
        else:
            yield path


def _without_corpora(files: list[Path]) -> tuple[list[Path], dict[str, int]]:
    """``files`` without those of corpora that were built among them, and how many those are, by a name for a person."""
    corpora = {
        folder for folder in {path.parent for path in files} if all((folder / name).exists() for name in _CORPUS)
    }
    kept = [path for path in files if path.parent not in corpora or path.name not in _OF_CORPUS]
    return kept, {"files of a corpus": len(files) - len(kept)} if len(kept) < len(files) else {}


def _in_folder(inside: list[Path], folder: Path, where: str) -> SourceFiles:
    """The data files of a folder, or its prose if it has no data."""
    inside, built = _without_corpora(inside)
    kinds = _DATA if any(_suffix(path) in _DATA for path in inside) else _PROSE
    files = [path for path in inside if _suffix(path) in kinds]
    others = Counter(_suffix(path) or "no suffix" for path in inside if _suffix(path) not in kinds)
    return _of_one_kind(files, {**others, **built}, folder, where)


def _of_one_kind(files: list[Path], others: dict[str, int], root: Path, where: str) -> SourceFiles:
    left_out = ", ".join(f"{name} {count}" for name, count in sorted(others.items()))
    if not files:
        instead = f" (but {left_out})" if left_out else ""
        raise ConfigError(f"{where} holds no {_KNOWN} files{instead}; convert them or give another folder or glob")
    kinds = {kind_of(path): path for path in files}
    if None in kinds:
        raise ConfigError(f"{where}: {kinds[None].name} is none of {_KNOWN}; convert it or name the files with a glob")
    if len(kinds) > 1:
        names = ", ".join(path.name for path in kinds.values())
        raise ConfigError(f"{where} mixes kinds of files ({names}); name one kind with a glob such as '*.jsonl'")
    _check_files(files, where)
    return SourceFiles(str(next(iter(kinds))), sorted(files, key=lambda path: order_of(_name(path, root))), left_out)


def _check_files(files: Iterable[Path], where: str) -> None:
    for path in files:
        if not path.is_file():
            what = "is a link to nothing" if path.is_symlink() and not path.exists() else "is no regular file"
            raise ConfigError(f"{where}: {path} {what}; repair or remove it")


def _name(path: Path, root: Path) -> str:
    """The name inside a source folder, so that moving the folder changes nothing; else the path."""
    return path.relative_to(root).as_posix() if root.is_dir() else path.as_posix()
