"""Writes docs/reference/keys.md: every configuration key, from the dataclasses and the comments of their fields."""

from __future__ import annotations

import ast
import dataclasses
import enum
import inspect
import io
import re
import tokenize
from pathlib import Path
from typing import Any, get_args, get_type_hints

from launch.generate import GenerateOptions
from launch.plan.plan import PlanOptions
from launch.slurm.options import PREFIX, SlurmOptions
from train.checkpoint.grow import GrowConfig
from train.checkpoint.merge import MergeConfig
from train.compose import compose
from train.data.stages import TrainingStage
from train.huggingface.export import ExportOptions
from train.huggingface.import_folder import ImportOptions
from train.transfer import TransferConfig

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "keys.md"
VERBS = {
    "export": ExportOptions,
    "import": ImportOptions,
    "generate": GenerateOptions,
    "grow": GrowConfig,
    "merge": MergeConfig,
    "transfer": TransferConfig,
    "slurm": SlurmOptions,
    "plan": PlanOptions,
}
ITEMS = {"data": [("Keys of each of `data.stages`", TrainingStage(0))]}  # of lists, by section
PREFIXES = {"slurm": PREFIX, "plan": "plan."}
HEAD = """# Configuration keys

Written by `make reference` from the dataclasses; do not edit. Defaults are those of `longcat train` without arguments
(`model=tiny data=python_source schedule=wsd`). How to set a key: [the guide](../guide/train.md). "Unpublished": the
LongCat-Flash technical report gives no value; "section 9": § 9 of [claims](../claims.md).
"""


def page() -> str:
    """The whole page as Markdown."""
    config = compose([])
    parts = [HEAD]
    for section in dataclasses.fields(config):
        part = getattr(config, section.name)
        parts.append(f"## {section.name}\n\n{prose(type(part))}\n\n{table(part, f'{section.name}.')}")
        parts += [f"### {key}\n\n{prose(type(item))}\n\n{table(item, '')}" for key, item in ITEMS.get(section.name, [])]
    parts.append("# Options of other commands\n")
    for verb, kind in VERBS.items():
        parts.append(f"## longcat {verb}\n\n{prose(kind)}\n\n{table(kind(), PREFIXES.get(verb, ''))}")
    return "\n".join(parts)


def prose(kind: type) -> str:
    """The docstring of a dataclass, as Markdown."""
    return (inspect.getdoc(kind) or "").replace("``", "`")


def table(part: Any, prefix: str) -> str:
    """One row per key of a dataclass instance; nested dataclasses are flattened."""
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *rows(part, prefix), ""])


def rows(part: Any, prefix: str) -> list[str]:
    found = []
    meanings, hints = comments(type(part)), get_type_hints(type(part))
    for option in dataclasses.fields(part):
        value, key = getattr(part, option.name), f"{prefix}{option.name}"
        if dataclasses.is_dataclass(value):
            found += rows(value, f"{key}.")
            continue
        cells = [f"`{key}`", type_text(hints[option.name]), f"`{value_text(value)}`", meanings.get(option.name, "")]
        found.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return found


def value_text(value: Any) -> str:
    """A default as a person writes it on the command line."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict):
        return "none"
    if isinstance(value, list):
        return f"[{','.join(value_text(item) for item in value)}]"
    if isinstance(value, float):
        return re.sub(r"e([+-])0?(\d)", lambda found: f"e{found[1].strip('+')}{found[2]}", f"{value:g}")
    return str(value) or "''"


def type_text(kind: Any) -> str:
    """A type, or the choices of an enumeration."""
    if inspect.isclass(kind) and issubclass(kind, enum.Enum):
        return ", ".join(f"`{member.value}`" for member in kind)
    options = [option for option in get_args(kind) if option is not type(None)]
    if getattr(kind, "__origin__", None) is dict:
        return "texts by name"
    if getattr(kind, "__origin__", None) is list:
        return f"list of {type_text(options[0])}"
    if options:
        return f"{type_text(options[0])} or null"
    return getattr(kind, "__name__", str(kind)).replace("Any", "int, str or list")


def comments(kind: type) -> dict[str, str]:
    """Field → its comment: the lines directly above it and the one behind it."""
    source = inspect.getsource(kind)
    by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    alone = {number for number, line in enumerate(source.splitlines(), 1) if re.match(r"\s*#", line)}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for node in definition.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            first = node.lineno
            while first - 1 in alone:
                first -= 1
            lines = [by_line[number] for number in range(first, (node.end_lineno or first) + 1) if number in by_line]
            found[node.target.id] = " ".join(lines)
    return found


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
