"""The documentation is current: keys and defaults, links, file paths, command lines."""

from __future__ import annotations

import ast
import math
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from launch.options import split_options
from launch.plan.plan import Arguments
from launch.slurm.options import split_slurm_options
from launch.verbs import VERBS
from longcat import errors
from parallel.sizes import resolve_sizes
from tests.house import picture, reference
from train.check import check_batch
from train.checkpoint.files import HASH
from train.compose import check_keys, compose, leaf_keys
from train.config import Config

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = compose([])
KEYS = (ROOT / "docs" / "reference" / "keys.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("CONTRIBUTING.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# Records of the past name files as they were
CURRENT = [page for page in PAGES if not re.search("decisions", page.relative_to(ROOT).as_posix())]
FOLDERS = "longcat|parallel|train|launch|configs|tests|benchmarks|docs|examples"
PACKAGES = ("longcat", "parallel", "train", "launch")
OTHERS = {"AutoTokenizer"}  # classes of other packages that pages name
FILES = [path for folder in FOLDERS.split("|") for path in (ROOT / folder).rglob("*.py")]
SOURCE = "\n".join(path.read_text(encoding="utf-8") for path in FILES if path.relative_to(ROOT).parts[0] in PACKAGES)
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
by_current_page = pytest.mark.parametrize("page", CURRENT, ids=lambda page: page.relative_to(ROOT).as_posix())


def _value(config: Config, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


def test_the_page_of_keys_is_current() -> None:
    assert reference.page() == KEYS, "docs/reference/keys.md is out of date; run `make reference`"


def test_the_picture_of_packages_is_current() -> None:
    drawn = picture.PICTURE.read_text(encoding="utf-8")
    assert picture.picture() == drawn, "docs/images/architecture.svg is out of date; run `make reference`"


@pytest.mark.parametrize("key", leaf_keys(Config))
def test_key_is_on_the_page_with_default_and_meaning(key: str) -> None:
    row = re.search(rf"^\| `{re.escape(key)}` \| [^|]+ \| `([^`]*)` \| (.*) \|$", KEYS, re.MULTILINE)
    assert row is not None, f"docs/reference/keys.md has no row for {key}"
    default = _value(DEFAULTS, key)
    assert isinstance(default, bool) or not isinstance(default, int | float) or float(row[1]) == default
    assert row[2], f"{key} has no comment in its dataclass"


def _anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"`|\[|\]\([^)]*\)", "", title.lower())).replace(" ", "-") for title in titles
    }


def _command_lines(page: Path) -> list[list[str]]:
    """Words of each `longcat …` or `torchrun … longcat-rank …` line of a page's code blocks, without placeholders."""
    lines = re.findall(r"^(?:    )?((?:longcat|torchrun) .*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return [[word for word in shlex.split(re.sub(r"\s#.*", "", line)) if word != "…"] for line in lines]


def _commands(page: Path) -> list[list[str]]:
    """The verb and its words of each command; torchrun's are those of `train`."""
    return [
        ["train", *words[words.index("longcat-rank") + 1 :]] if words[0] == "torchrun" else words[1:]
        for words in _command_lines(page)
    ]


@by_page
def test_links_and_anchors_resolve(page: Path) -> None:
    text = re.sub(r"`[^`]*`|^    .*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        if ":" in name:
            continue
        target = (page.parent / name) if name else page
        if not target.exists() or (anchor and anchor not in _anchors(target)):
            broken.append(link)
    assert not broken


@by_current_page
def test_named_files_and_modules_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    paths = set(re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w/.-]*\w", text))
    paths |= {module.replace(".", "/") for module in re.findall(r"python -m ((?:benchmarks|tests)\.[a-z_.]+)", text)}
    names = {path.name for path in FILES}
    missing = {path for path in paths if not (ROOT / path).exists() and not (ROOT / f"{path}.py").exists()}
    missing |= {name for name in re.findall(r"`(\w+\.py)`", text) if name not in names}
    assert not missing


@by_current_page
def test_commands_parse(page: Path) -> None:
    for verb, *words in _commands(page):
        assert verb in VERBS, f"longcat {verb} is no verb"
        if verb == "data":
            assert words.pop(0) == "build"
        if verb == "slurm":
            _, words = split_slurm_options([word for word in words if word not in ("--submit", "…")])
            compose(words)
        elif verb == "plan":
            compose(split_options(Arguments, [word for word in words if word not in ("--json", "search")])[1])
        elif verb in reference.VERBS:
            _, words = split_options(reference.VERBS[verb], words)
            assert verb in ("import", "transfer") or not words, f"longcat {verb} has no options {words}"
        if verb == "train" and "-m" in words:
            check_keys([word for word in words if word != "-m"], sweep=True)
        elif verb in ("train", "check", "data", "counts", "import", "transfer"):
            compose([word for word in words if (verb, word) != ("train", "plan=true")])


def _number(words: list[str], *names: str) -> int:
    """The product of the numbers that follow these options, or are the values of these keys; 1 where one is absent."""
    after = dict(pairwise(words)) | dict(word.split("=", 1) for word in words if "=" in word)
    return math.prod(int(after.get(name, 1)) for name in names)


@by_current_page
def test_commands_have_a_batch_that_their_ranks_can_share(page: Path) -> None:
    for line, (verb, *words) in zip(_command_lines(page), _commands(page), strict=True):
        if verb not in ("train", "check", "slurm") or "-m" in words or "plan=true" in words:
            continue
        words = split_slurm_options([word for word in words if word != "--submit"])[1] if verb == "slurm" else words
        config = compose(words)
        ranks = config.run.num_processes if config.run.num_processes > 0 else 1
        ranks *= _number(line, "--nproc-per-node", "--nnodes", "launch.nodes", "slurm.nodes", "slurm.gpus_per_node")
        check_batch(config, resolve_sizes(config.parallel, ranks))


def _table_keys(page: str) -> set[str]:
    return set(re.findall(r"^\| `?(\w+)`? \|", (ROOT / "docs" / page).read_text(encoding="utf-8"), re.MULTILINE))


def test_the_page_of_metrics_names_what_a_step_writes() -> None:
    written = {HASH}
    for name in ("step", "loop", "health/monitor"):
        tree = ast.parse((ROOT / "train" / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if (
                isinstance(node, ast.Subscript)
                and isinstance(node.ctx, ast.Store)
                and "metrics" in ast.unparse(node.value)
            ):
                written.add(ast.literal_eval(node.slice))
            if isinstance(node, ast.FunctionDef) and node.name in ("_metrics", "observe"):
                dicts = [part for part in ast.walk(node) if isinstance(part, ast.Dict)]
                written |= {ast.literal_eval(key) for part in dicts for key in part.keys if key is not None}
    assert _table_keys("reference/metrics.md") - {"key"} == written


def test_the_page_of_exit_codes_names_each() -> None:
    codes = {str(value) for name, value in vars(errors).items() if name.isupper() and isinstance(value, int)}
    assert _table_keys("guide/exit_codes.md") - {"code"} == codes


@by_current_page
def test_named_classes_exist(page: Path) -> None:
    names = re.findall(r"`([A-Z]\w*[a-z]\w*)(?:\.(\w+))?`", page.read_text(encoding="utf-8"))
    ours = {(name, member) for name, member in names if re.search(r"[a-z][A-Z]", name) and name not in OTHERS}
    missing = {name for name, _ in ours if not re.search(rf"^class {name}\b|^{name} = ", SOURCE, re.MULTILINE)}
    missing |= {f"{name}.{member}" for name, member in ours if member and not re.search(rf"def {member}\b", SOURCE)}
    assert not missing
