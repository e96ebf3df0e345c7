"""The rules of the house: which package may import which, docstrings, every key of the configuration read."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from tests.house.figures import private_name_figures

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ["longcat", "parallel", "train", "launch"]  # each may import itself and those before it
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MAX_TEST_NAME = 60


def _files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _imports(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, also those inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{_relative(path)}:{node.lineno}: relative import"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def _top_level_imports(path: Path) -> set[str]:
    return {name.split(".")[0] for name in _imports(path)}


SOURCES = _files(*PACKAGES)
EVERYTHING = _files(*PACKAGES, "configs", "benchmarks", "examples", "docs", "tests")


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way_only(package: str) -> None:
    forbidden = {*PACKAGES[PACKAGES.index(package) + 1 :], "tests", "benchmarks"}
    wrong = {_relative(path): found for path in _files(package) if (found := forbidden & _top_level_imports(path))}
    assert not wrong, f"{package} may import only {PACKAGES[: PACKAGES.index(package) + 1]}"


def test_the_model_knows_no_process_group() -> None:
    wrong = {
        _relative(path): found
        for path in _files("longcat")
        if (found := sorted(name for name in _imports(path) if name.startswith("torch.distributed")))
    }
    assert not wrong, "the model must not know where it runs"
    for path in _files("longcat"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        uses = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
        assert "torch.distributed" not in uses, f"{_relative(path)} reaches torch.distributed by attribute"


def test_only_tests_and_benchmarks_import_transformers() -> None:
    wrong = [_relative(path) for path in SOURCES if "transformers" in _top_level_imports(path)]
    assert not wrong


def test_git_ignores_no_source() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout; this tree is none")
    sources = [*EVERYTHING, *(ROOT / "configs").rglob("*.yaml"), *(ROOT / "docs").rglob("*.md")]
    names = "\n".join(_relative(path) for path in sources)
    command = ["git", "check-ignore", "--no-index", "--stdin"]
    answer = subprocess.run(command, input=names, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode in (0, 1), answer.stderr
    assert not answer.stdout, f".gitignore keeps these out of every clone:\n{answer.stdout}"


@pytest.mark.parametrize("path", EVERYTHING, ids=_relative)
def test_first_line_says_the_subject(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    first = text.splitlines()[0]
    assert first.startswith('"""') and len(first) > 20, f"the first line says no subject: {first!r}"


@pytest.mark.parametrize("path", EVERYTHING, ids=_relative)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


class _Reads(ast.NodeVisitor):
    """Attribute reads as (attribute, last name before it, class around it), less those in checks of input."""

    def __init__(self) -> None:
        self.found: set[tuple[str, str, str]] = set()
        self.inside = ""

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        around, self.inside = self.inside, node.name
        self.generic_visit(node)
        self.inside = around

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if "validate" not in node.name:  # to check a key is not to use it
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.found.add((node.attr, ast.unparse(node.value).split(".")[-1], self.inside))
        self.generic_visit(node)


def _config_keys() -> Iterator[tuple[str, str, Any]]:
    """(section, key, the section's class) of the whole configuration."""
    from train.config import Config

    for section, kind in get_type_hints(Config).items():
        assert is_dataclass(kind), f"{section} is no section"
        for key in get_type_hints(kind):
            yield section, key, kind


def test_each_key_of_the_configuration_is_read() -> None:
    from parallel.mesh import Axis

    reads = _Reads()
    for path in SOURCES:
        reads.visit(ast.parse(path.read_text(encoding="utf-8")))
    axes = {axis.value for axis in Axis}  # parallel.<axis> is read by the axis's value

    def is_read(section: str, key: str, kind: Any) -> bool:
        holders = {section, "config", "settings"}
        return (section == "parallel" and key in axes) or any(
            name == key and (holder in holders or (holder == "self" and around == kind.__name__))
            for name, holder, around in reads.found
        )

    keys = list(_config_keys())
    assert len(keys) > 50
    unread = [f"{section}.{key}" for section, key, kind in keys if not is_read(section, key, kind)]
    assert not unread, f"keys that nothing reads: {unread}"


def test_each_choice_of_the_configuration_composes() -> None:
    from train.compose import compose

    choices = [
        f"{folder.name}={path.stem}"
        for folder in sorted((ROOT / "configs").iterdir())
        if folder.is_dir()
        for path in sorted(folder.glob("*.yaml"))
    ]
    assert choices
    for choice in choices:
        compose([choice])


def test_json_is_written_in_one_place() -> None:
    """`json.dump` writes NaN, which is no JSON. Heartbeats may use it: they are read by Python alone."""
    allowed = {"longcat/json_text.py", "parallel/watchdog/heartbeats.py"}
    used = {
        _relative(path)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.dump", "json.dumps")
    }
    assert used == allowed, "use longcat.json_text.dumps"


def test_test_names_are_short_and_unique_in_their_file() -> None:
    """A name states the claim; the rest is its docstring."""
    for path in _files("tests"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
        assert len(names) == len(set(names)), f"{_relative(path)} defines a test twice"
        assert not [name for name in names if len(name) > MAX_TEST_NAME], f"long test names in {_relative(path)}"


def test_tests_share_helpers_through_support_alone() -> None:
    """No file imports a test module, and helpers of several folders are in tests/support."""
    wrong = []
    for path in _files("tests"):
        folder = ".".join(path.parent.relative_to(ROOT).parts)
        for name in _imports(path):
            shared = f"{name}.".startswith(("tests.support.", f"{folder}."))
            is_test = any(part.startswith("test_") for part in name.split("."))
            if name.startswith("tests.") and (is_test or not shared):
                wrong.append(f"{_relative(path)} imports {name}")
    assert not wrong


def test_private_names_of_torch_are_in_one_file_per_package() -> None:
    """Imports and attributes with a leading underscore, also as strings, that no file of the four packages defines."""
    wrong = private_name_figures(SOURCES, ROOT)["private_names"]
    assert not wrong["torch"], "put these into parallel/torch_internals.py or longcat/ops/torch_internals.py"
    assert all(name.startswith("parallel/deepspeed/") for name in wrong["deepspeed"]), wrong["deepspeed"]


def test_no_module_imports_a_private_name_of_another() -> None:
    """What two modules need is public."""
    ours = {*PACKAGES, "benchmarks", "tests"}
    wrong = [
        f"{_relative(path)}:{node.lineno} imports {alias.name} of {node.module}"
        for path in EVERYTHING
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ours
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
    ]
    assert not wrong


def test_no_class_name_stands_twice() -> None:
    """A reader who meets a name finds one class for it in the four packages."""
    places: dict[str, list[str]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(f"{_relative(path)}:{node.lineno}")
    assert not {name: found for name, found in places.items() if len(found) > 1}
