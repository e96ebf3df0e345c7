"""Figures of one or more checkouts, side by side: sizes, types, imports, torch's private names, docs, names of tests.

`python tests/house/figures.py BEFORE AFTER` prints a markdown table; `--json FILE` also writes the figures and lists
behind them. It needs only the standard library, and imports nothing of a checkout.

How it counts:

- A function is any `def` of the four packages, nested ones too, without its decorators. Its parameters are counted
  without the `self` or `cls` of a method.
- A module's neighbours are the modules of the four packages that it imports or that import it, each once.
- A room is a first-level sub-package, or one file at a package's root. An arrow is an ordered pair of rooms of one
  package where a file of the first imports the second, each pair once.
- A private name of torch is a dotted name with a part that starts with `_`, or a private attribute (also as a string,
  for getattr) that no file of the four packages defines. In files that import deepspeed, such attributes are
  DeepSpeed's and are counted apart.
"""

from __future__ import annotations

import argparse
import ast
import json
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

PACKAGES = ("longcat", "parallel", "train", "launch")
PUBLIC = {
    "_replace",
    "_asdict",
    "_fields",
    "_exit",
    "_value_",
    "_name_",
    "_missing_",
}  # documented
OF_MODULES = {"_parameters", "_buffers", "_modules"}  # torch.nn.Module's, in files that import deepspeed too
LONG_NAME = 60
MANY_PARAMETERS = 6
Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def percentile(values: list[int], share: float) -> int:
    """The smallest value that at least ``share`` of the values do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def sizes(values: list[int]) -> dict[str, int]:
    return {
        "count": len(values),
        "median": round(median(values)),
        "p90": percentile(values, 0.9),
        "longest": max(values),
    }


# --- functions ---------------------------------------------------------------------------------------------------


def parameters(node: Function, is_method: bool) -> list[ast.arg]:
    """All parameters of a function, without the first one of a method that is not static."""
    spec = node.args
    found = [*spec.posonlyargs, *spec.args]
    static = any(isinstance(word, ast.Name) and word.id == "staticmethod" for word in node.decorator_list)
    found = found[1:] if is_method and not static else found
    return found + spec.kwonlyargs + [arg for arg in (spec.vararg, spec.kwarg) if arg]


def functions(tree: ast.Module) -> Iterator[tuple[Function, list[ast.arg]]]:
    for parent in ast.walk(tree):
        for node in ast.iter_child_nodes(parent):
            if isinstance(node, Function):
                yield node, parameters(node, isinstance(parent, ast.ClassDef))


def function_figures(files: list[Path]) -> dict[str, Any]:
    found = [each for path in files for each in functions(parse(path))]
    args = [arg for _, args in found for arg in args]
    return {
        "functions": sizes([(node.end_lineno or node.lineno) - node.lineno + 1 for node, _ in found]),
        "arguments_annotated": sum(arg.annotation is not None for arg in args) / len(args),
        "functions_with_many_parameters": sum(len(args) > MANY_PARAMETERS for _, args in found),
    }


# --- imports -----------------------------------------------------------------------------------------------------


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.Module, modules: set[str]) -> set[str]:
    """The modules among ``modules`` that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            while name and name not in modules:
                name = name.rpartition(".")[0]
            found.add(name)
    return found - {""}


def import_figures(files: list[Path], root: Path) -> dict[str, Any]:
    modules = {module_of(path, root) for path in files}
    packages = {module_of(path, root) for path in files if path.name == "__init__.py"}
    pairs = {(module_of(path, root), other) for path in files for other in imports(parse(path), modules)}
    pairs = {(module, other) for module, other in pairs if module != other}
    neighbours: dict[str, set[str]] = {module: set() for module in modules}
    for one, other in pairs:
        neighbours[one].add(other)
        neighbours[other].add(one)
    busiest = max(sorted(modules - set(PACKAGES)), key=lambda module: len(neighbours[module]))

    def room(module: str) -> str:
        parts = module.split(".")
        return ".".join(parts[:2]) if len(parts) > 2 or module in packages else module

    arrows = {}
    for package in PACKAGES:
        inside = [(a, b) for a, b in pairs if a.split(".")[0] == package == b.split(".")[0] and room(a) != room(b)]
        arrows[package] = {"between_rooms": len({(room(a), room(b)) for a, b in inside}), "of_files": len(inside)}
    return {"busiest_module": {"name": busiest, "neighbours": len(neighbours[busiest])}, "arrows": arrows}


# --- private names of torch --------------------------------------------------------------------------------------


def private(dotted: str) -> bool:
    """Whether a part of a dotted name starts with one underscore."""
    return any(part.startswith("_") and not part.startswith("__") and part != "_" for part in dotted.split("."))


def defined_names(trees: list[ast.Module]) -> set[str]:
    """Names that these files define: functions, classes, variables, attributes of self."""
    found = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, Function | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            found.add(node.attr)
    return found


def foreign_private_names(tree: ast.Module, ours: set[str]) -> Iterator[tuple[int, str]]:
    """(line, name) of each private name of another package that a file reads."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and private(node.attr) and node.attr not in ours:
            names = [ast.unparse(node)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
            names = [] if node.value in ours else [node.value]
        yield from ((node.lineno, name) for name in names if private(name) and name.partition(".")[0] not in PACKAGES)


def private_name_figures(files: list[Path], root: Path) -> dict[str, Any]:
    ours = defined_names([parse(path) for path in files]) | PUBLIC
    found: dict[str, list[str]] = {"torch": [], "deepspeed": []}
    for path in files:
        if path.name == "torch_internals.py":
            continue
        top_level = {name.partition(".")[0] for name in _imported(parse(path))}
        for line, name in sorted(foreign_private_names(parse(path), ours)):
            of_torch = name.startswith("torch.") or name.rpartition(".")[2] in OF_MODULES
            library = "deepspeed" if "deepspeed" in top_level and not of_torch else "torch"
            found[library].append(f"{path.relative_to(root)}:{line} {name}")
    return {"private_names": found}


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


# --- files, docs, tests ------------------------------------------------------------------------------------------


def file_figures(files: list[Path], root: Path) -> dict[str, Any]:
    texts = [path.read_text(encoding="utf-8") for path in files]
    folders = Counter(path.parent.relative_to(root).as_posix() for path in files if path.name != "__init__.py")
    return {
        "files": sizes([len(text.splitlines()) for text in texts]),
        "type_ignores": sum(text.count("# type: ignore") for text in texts),
        "files_in_folder": dict(sorted(folders.items())),
    }


def doc_figures(root: Path) -> dict[str, Any]:
    pages = [
        root / "README.md",
        root / "CHANGELOG.md",
        root / "CONTRIBUTING.md",
        *sorted((root / "docs").rglob("*.md")),
    ]
    words = {
        page.relative_to(root).as_posix(): len(page.read_text(encoding="utf-8").split())
        for page in pages
        if page.is_file()
    }
    return {"words_of_docs": sum(words.values()), "words_of_page": words}


def figures_of_tests(root: Path) -> dict[str, Any]:
    names = [
        node.name
        for path in sorted((root / "tests").rglob("test_*.py"))
        for node, _ in functions(parse(path))
        if node.name.startswith("test_")
    ]
    return {
        "tests": len(names),
        "words_per_test_name": round(median(len(name.split("_")) - 1 for name in names)),
        "longest_test_name": max(map(len, names)),
        "long_test_names": sum(len(name) > LONG_NAME for name in names),
    }


def figures(root: Path) -> dict[str, Any]:
    """All figures of a checkout, with the lists behind some of them."""
    files = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return {
        **function_figures(files),
        **file_figures(files, root),
        **import_figures(files, root),
        **private_name_figures(files, root),
        **doc_figures(root),
        **figures_of_tests(root),
    }


def rows(found: dict[str, Any]) -> dict[str, str]:
    """Label → value, as the table shows them."""

    def size(of: dict[str, int]) -> str:
        return f"{of['count']:,} · {of['median']} · {of['p90']} · {of['longest']}"

    folders = found["files_in_folder"]
    largest = max(folders, key=folders.get)
    busiest = found["busiest_module"]
    return {
        "functions: count · median lines · p90 · longest": size(found["functions"]),
        "files: count · median lines · p90 · longest": size(found["files"]),
        "arguments annotated": f"{found['arguments_annotated']:.1%}",
        f"functions with more than {MANY_PARAMETERS} parameters": str(found["functions_with_many_parameters"]),
        "`type: ignore`s": str(found["type_ignores"]),
        "neighbours of the busiest module": f"{busiest['neighbours']} (`{busiest['name']}`)",
        **{
            f"arrows between rooms of {package}: pairs of rooms · pairs of files": " · ".join(map(str, arrows.values()))
            for package, arrows in found["arrows"].items()
        },
        "private names of torch outside torch_internals.py": str(len(found["private_names"]["torch"])),
        "private names of DeepSpeed": str(len(found["private_names"]["deepspeed"])),
        "files at the root of longcat · parallel · train · launch": " · ".join(str(folders[name]) for name in PACKAGES),
        "files of the largest folder": f"{folders[largest]} (`{largest}/`)",
        "words of README, docs, CHANGELOG, CONTRIBUTING": f"{found['words_of_docs']:,}",
        "test functions": f"{found['tests']:,}",
        "words per test name, median": str(found["words_per_test_name"]),
        "longest test name, characters": str(found["longest_test_name"]),
        f"test names over {LONG_NAME} characters": str(found["long_test_names"]),
    }


def table(names: list[str], columns: list[dict[str, str]]) -> str:
    lines = [f"| | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    lines += [f"| {label} | {' | '.join(column[label] for column in columns)} |" for label in columns[0]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path(".")], help="paths, one column for each")
    parser.add_argument("--names", nargs="*", help="heads of the columns; the paths if left out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and their lists there")
    options = parser.parse_args()
    found = [figures(path.resolve()) for path in options.checkouts]
    names = options.names or [str(path) for path in options.checkouts]
    print(table(names, [rows(each) for each in found]))
    if options.json:
        options.json.write_text(json.dumps(dict(zip(names, found, strict=True)), indent=2) + "\n")


if __name__ == "__main__":
    main()
