"""Files of the user's own folder, such as train.py or json.py, are never run in the place of this program's."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.ports import free_ports
from tests.support.running import NARROW, ROOT, lines
from train.run_dir.folder import read_config

OWN_FILES = ("train.py", "json.py", "random.py", "torch.py", "parallel.py", "configs.py", "hydra.py")
OWN_FOLDERS = ("longcat", "datasets", "wandb", "omegaconf")
PROGRAM = "import sys\nfrom {module} import main\nsys.exit(main())\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder with modules that end the process with code 0, as a script without arguments may."""
    folder = tmp_path / "mine"
    folder.mkdir()
    body = "import os\nprint('the wrong module', __file__, flush=True)\nos._exit(0)\n"
    for name in OWN_FILES:
        (folder / name).write_text(body)
    for name in OWN_FOLDERS:
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(body)
    return folder


def run(command: list[str], folder: Path, path: str = str(ROOT)) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert "the wrong module" not in answer.stdout + answer.stderr, answer.stdout + answer.stderr
    return answer


def program(name: str, module: str, tmp_path: Path) -> str:
    """A console script, as pip writes it."""
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{PROGRAM.format(module=module)}")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def short(overrides: list[str]) -> list[str]:
    return [*overrides, *NARROW, "train.steps=2", "logging.hash_every=0"]


@pytest.mark.long
def test_longcat_trains_beside_own_modules(folder: Path, tmp_path: Path, short: list[str]) -> None:
    """Two ranks, each a Python of its own."""
    longcat = program("longcat", "launch.__main__", tmp_path)
    answer = run([longcat, "train", *short, "run.num_processes=2"], folder)
    assert answer.returncode == 0, answer.stderr
    assert len(lines(tmp_path / "run")) == 2


@pytest.mark.parametrize("entry", ["{folder}", ".", ""])
@pytest.mark.parametrize("name,module", [("longcat", "launch.__main__"), ("longcat-rank", "train.__main__")])
def test_programs_ignore_a_pythonpath_of_here(
    name: str, module: str, entry: str, folder: Path, tmp_path: Path, short: list[str]
) -> None:
    """`PYTHONPATH=$PWD:`, as shells' start files set it; a typo is answered by this program."""
    if name == "longcat-rank":
        (folder / "train.py").unlink()  # Python looks for the program itself before that can do anything
    words = ["train"] if name == "longcat" else []
    path = os.pathsep.join([entry.format(folder=folder), str(ROOT), ""])
    answer = run([program(name, module, tmp_path), *words, *short, "train.stpes=1"], folder, path)
    assert answer.returncode == 2
    assert "'train.steps'" in answer.stderr


def test_ranks_train_with_a_pythonpath_of_here(folder: Path, tmp_path: Path, short: list[str]) -> None:
    longcat = program("longcat", "launch.__main__", tmp_path)
    path = os.pathsep.join([str(folder), str(ROOT), ""])
    answer = run([longcat, "train", *short, "run.num_processes=2"], folder, path)
    assert answer.returncode == 0, answer.stderr
    assert len(lines(tmp_path / "run")) == 2
    command = read_config(tmp_path / "run")["environment"]["command"]
    assert command.startswith("longcat train model=debug ") and command.endswith(" run.num_processes=2")


def own_package(folder: Path) -> None:
    """A folder train/ in place of the file."""
    (folder / "train").mkdir()
    (folder / "train.py").rename(folder / "train" / "__init__.py")


@pytest.mark.parametrize("safe_path", [False, True], ids=["longcat-rank", "safe path"])
def test_torchrun_trains_beside_own_modules(
    safe_path: bool, folder: Path, tmp_path: Path, short: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The documented commands: `torchrun --no-python longcat-rank`, `PYTHONSAFEPATH=1 torchrun -m train`."""
    own_package(folder)
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    if safe_path:
        monkeypatch.setenv("PYTHONSAFEPATH", "1")
        words = ["-m", "train"]
    else:
        words = ["--no-python", program("longcat-rank", "train.__main__", tmp_path)]
    answer = run([*torchrun, *words, *short], folder)
    assert answer.returncode == 0, answer.stderr
    assert len(lines(tmp_path / "run")) == 2


@pytest.mark.long
def test_nodes_train_beside_own_modules(folder: Path, tmp_path: Path, short: list[str]) -> None:
    """Node runners, the store, its child and the ranks are Pythons of their own."""
    own_package(folder)
    (folder / "launch").mkdir()
    (folder / "launch" / "__init__.py").write_text((folder / "json.py").read_text())
    longcat = program("longcat", "launch.__main__", tmp_path)
    words = [longcat, "train", *short, "run.num_processes=1", "launch.nodes=2"]
    words.append(f"launch.rendezvous=127.0.0.1:{free_ports(1)[0]}")
    with ThreadPoolExecutor() as pool:
        for answer in pool.map(lambda _: run(words, folder), range(2)):
            assert answer.returncode == 0, answer.stderr
    assert len(lines(tmp_path / "run")) == 2


@pytest.mark.parametrize("remaining", [("train.py",), ()])
def test_python_m_ignores_own_modules(folder: Path, short: list[str], remaining: tuple[str, ...]) -> None:
    """`python -m launch`, and `python -m train` where no own train.py is; a typo is answered by this program."""
    module = "launch" if remaining else "train"
    if not remaining:
        (folder / "train.py").unlink()
    words = ["train"] if module == "launch" else []
    answer = run([sys.executable, "-m", module, *words, *short, "train.stpes=1"], folder)
    assert answer.returncode == 2
    assert "'train.steps'" in answer.stderr
