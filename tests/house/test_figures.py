"""The script of figures: it runs on this tree, and counts what a small tree holds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests" / "house" / "figures.py"
SMALL = {
    "longcat/errors.py": "class Error(Exception): ...\n",
    "parallel/mesh.py": "from longcat.errors import Error\n\ndef mesh(a: int, b):  # type: ignore\n    raise Error\n",
    "parallel/fsdp/a.py": "import torch\nimport parallel.mesh\n\ndef f(group):\n    torch._C.f(), group._unshard()\n",
    "parallel/fsdp/b.py": "from parallel.fsdp import a\nfrom parallel.mesh import mesh\n",
    "parallel/torch_internals.py": "from torch._C import f\n",
    "train/run.py": "class Run:\n    def run(self, a, b, c, d, e, f): self._steps = self._steps\n",
    "launch/__init__.py": "",
    "launch/main.py": "from train import run\n",
    "README.md": "Two words.\n",
    "tests/test_all.py": f"def test_{'a' * 60}():\n    pass\n",
}


def run(*words: str | Path) -> str:
    command = [sys.executable, str(SCRIPT), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_figures_of_a_small_tree(tmp_path: Path) -> None:
    for name, text in SMALL.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    run(tmp_path, "--names", "small", "--json", tmp_path / "figures.json")
    found = json.loads((tmp_path / "figures.json").read_text())["small"]
    assert found["functions"] == {"count": 3, "median": 2, "p90": 2, "longest": 2}
    assert found["arguments_annotated"] == 1 / 9
    assert found["functions_with_many_parameters"] == 0
    assert found["type_ignores"] == 1
    assert found["busiest_module"] == {"name": "parallel.mesh", "neighbours": 3}
    assert found["arrows"]["parallel"] == {"between_rooms": 1, "of_files": 2}
    assert [name.split()[1] for name in found["private_names"]["torch"]] == ["group._unshard", "torch._C"]
    assert found["words_of_docs"] == 2
    assert (found["tests"], found["longest_test_name"], found["long_test_names"]) == (1, 65, 1)


def test_figures_of_this_tree() -> None:
    lines = run(ROOT, ROOT, "--names", "before", "after").splitlines()
    assert lines[0] == "| | before | after |"
    assert all(line.count("|") == 4 for line in lines)
    assert any(line.startswith("| arguments annotated | 9") for line in lines)
