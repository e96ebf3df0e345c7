"""Text that machines have without a download: Python sources, manual pages and changelogs of what is installed."""

from __future__ import annotations

import importlib.util
import os
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from longcat.errors import ConfigError
from train.data.config import PYTHON_SOURCE
from train.data.files import order_of

MANUAL_PAGES, CHANGELOGS = Path("/usr/share/man"), Path("/usr/share/doc")
# Python sources that are tables, data or tests rather than code: zlib compresses them 4.5 to 8 times, ordinary modules
# 3.5 to 4 times, and `test` alone would be half of the standard library.
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idlelib", "idle_test"} | {
    "turtledemo", "pydoc_data", "encodings", "lib2to3", "generated"
}  # fmt: skip
_LARGEST_FILE = 100_000  # bytes; with 500 kB one file could be half of the validation text
_SHORTEST_PAGE = 200  # characters; shorter pages only name another one
_CHANGES = re.compile(r"(changelog|changes|news)\b", re.IGNORECASE)


@dataclass(frozen=True)
class MachineText:
    """A source of this kind: its files as (name, path), names being the same on machines that have the same files."""

    what: str  # for the message where a machine has none
    find: Callable[[], Iterator[tuple[str, Path]]]
    clean: Callable[[str], str] = str  # a file's text → a document, empty for none

    def files(self, source: str) -> list[Path]:
        """The files of ordinary size, mixed by the hashes of their names.

        Raises:
            ConfigError: this machine has none.
        """
        named = [(name, path) for name, path in self.find() if 0 < path.stat().st_size <= _LARGEST_FILE]
        if not named:
            raise ConfigError(f"data.source={source}: this machine has no {self.what}; give another source")
        return [path for _, path in sorted(named, key=lambda item: order_of(item[0]))]


def _below(root: Path, wanted: Callable[[str], bool], left_out: set[str] | None = None) -> Iterator[tuple[str, Path]]:
    """(name inside ``root``, path) of the files below it."""
    for folder, inside, names in os.walk(root):
        inside[:] = sorted(set(inside) - (left_out or set()))
        for path in (Path(folder, name) for name in sorted(names) if wanted(name)):
            yield path.relative_to(root).as_posix(), path


def _python_files() -> Iterator[tuple[str, Path]]:
    """Sources of the standard library and of torch."""
    specification = importlib.util.find_spec("torch")
    roots = {"stdlib": Path(sysconfig.get_path("stdlib"))}
    if specification is not None and specification.origin is not None:
        roots["torch"] = Path(specification.origin).parent
    for label, root in roots.items():
        for name, path in _below(root, lambda name: name.endswith(".py"), _LEFT_OUT):
            yield f"{label}/{name}", path


def _manual_pages() -> Iterator[tuple[str, Path]]:
    """Manual pages in English: those in man1 to man9, not in a language's folder."""
    for section in sorted(MANUAL_PAGES.glob("man[1-9]*")):
        for name, path in _below(section, lambda name: True):
            if not path.is_symlink():  # another name of the same page
                yield f"{section.name}/{name}", path


def _changelogs() -> Iterator[tuple[str, Path]]:
    """Changelogs and news of installed packages, as text or compressed."""

    def wanted(name: str) -> bool:
        return _CHANGES.match(name) is not None and not name.lower().endswith((".html", ".html.gz"))

    return ((name, path) for name, path in _below(CHANGELOGS, wanted) if not path.is_symlink())


_GLYPHS = {
    "aq": "'", "cq": "'", "oq": "'", "dq": '"', "lq": '"', "rq": '"', "en": "-", "em": "--", "hy": "-", "mi": "-",
    "bu": "*", "co": "(C)", "rs": "\\", "ti": "~", "ha": "^", "ga": "`", "->": "->", "<=": "<=", ">=": ">=", "mu": "x",
    "or": "|",
}  # fmt: skip
_ESCAPE = re.compile(
    r"\\(?:f\[[^]]*\]|f\(..|f.|s[-+]?\d+|[mM*nkF]\[[^]]*\]|[*n]\(..|[*n].|[hvwlLDN]'[^']*'"
    r"|\((?P<two>..)|\[(?P<named>[^]]*)\]|(?P<one>.))"
)
_MEANING = {"-": "-", "e": "\\", "\\": "\\", " ": " ", "~": " ", "0": " ", "'": "'", "`": "`", ".": "."}
_HEADINGS = {"SH", "SS", "Sh", "Ss"}
_WORDS = {
    "B",
    "I",
    "R",
    "SM",
    "SB",
    "BR",
    "RB",
    "BI",
    "IB",
    "IR",
    "RI",
    "Nm",
    "Nd",
    "Fl",
    "Ar",
    "Pa",
    "Xr",
    "It",
    "Dl",
    "Em",
}
_JOINED = {"BR", "RB", "BI", "IB", "IR", "RI"}  # their arguments follow each other without a space
_BREAKS = {"PP", "P", "LP", "TP", "IP", "HP", "Pp", "TQ", "sp", "Bl", "El"}
_ARGUMENT = re.compile(r'"((?:[^"]|"")*)"?|(\S+)')


def page_text(roff: str) -> str:
    """The words of a manual page without its requests and fonts; empty for a page that only includes another one."""
    lines: list[str] = []
    inside_definition = False
    for line in roff.splitlines():
        if inside_definition or not line.startswith((".", "'")):
            inside_definition = inside_definition and not line.startswith("..")
            lines.append("" if inside_definition or line.startswith("..") else _without_escapes(line))
            continue
        request, _, rest = line[1:].lstrip().partition(" ")
        words = [_without_escapes(quoted or plain) for quoted, plain in _ARGUMENT.findall(rest)]
        if request in ("de", "ig", "am"):
            inside_definition = True
        elif request in _HEADINGS:
            lines += ["", " ".join(words)]
        elif request in _WORDS:
            lines.append(("" if request in _JOINED else " ").join(words))
        elif request in _BREAKS:
            lines += ["", *words[:1]]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in lines)).strip()
    return f"{text}\n" if len(text) >= _SHORTEST_PAGE else ""


def _without_escapes(text: str) -> str:
    """``text`` with roff's escapes as characters, and without its comments."""

    def character(found: re.Match[str]) -> str:
        name = found["two"] or found["named"]
        if name is not None:
            code = re.fullmatch(r"u([0-9A-F]{4,6})", name)
            return chr(int(code[1], 16)) if code and int(code[1], 16) < 0x110000 else _GLYPHS.get(name, "")
        return _MEANING.get(found["one"] or "", "")

    return _ESCAPE.sub(character, re.sub(r'\\["#].*', "", text))


MACHINE_TEXT = {
    PYTHON_SOURCE: MachineText("Python sources", _python_files),
    "manual_pages": MachineText(f"manual pages in {MANUAL_PAGES}", _manual_pages, page_text),
    "changelogs": MachineText(f"changelogs in {CHANGELOGS}", _changelogs),
}
