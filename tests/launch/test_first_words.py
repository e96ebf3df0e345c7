"""What a person types first: help, versions, misspelt words, own experiments, a look at what would be trained."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.__main__ import main as longcat
from launch.verbs import VERBS
from longcat import __version__
from longcat.counts import human
from tests.support.fixtures import Refused
from tests.support.running import ROOT, contents
from train.compose import compose, leaf_keys
from train.config import Config
from train.keys.suggestions import SYNONYMS
from train.samples import find_padding

FIRST_WORDS = [
    ["--help"], ["--version"], ["trian"], ["train", "--help"], ["train", "optim.learning_rate=1"],
    ["train", "model=huge"], ["train", "optim.lr=fast"], ["train", "optim.eps=0"], ["train", "--cfg", "job"],
    ["train", "-m", "optim.learning_rate=1,2"], ["completion", "bash"],
]  # fmt: skip
EXPERIMENTS = [path.stem for path in (ROOT / "configs" / "experiment").glob("*.yaml")]


@pytest.mark.parametrize("words", FIRST_WORDS, ids=" ".join)
def test_quick_answers_do_not_import_torch(words: list[str]) -> None:
    """Importing torch takes seconds; without it a wrong key is answered in tenths of one."""
    code = (
        "import sys\nfrom launch.__main__ import main\n"
        f"main({words!r})\n"
        "sys.exit(7 if {'torch', 'datasets', 'megatron', 'wandb'} & set(sys.modules) else 0)"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("optim.learning_rate", "optim.lr"),
        ("learning_rate", "optim.lr"),
        ("train.learning_rate", "optim.lr"),
        ("train.lr", "optim.lr"),
        ("lr", "optim.lr"),
        ("optim.lrs", "optim.lr"),
        ("batch_size", "train.global_batch_size"),
        ("train.seq_len", "train.sequence_length"),
        ("model.n_layers", "model.num_layers"),
        ("optim.weightdecay", "optim.weight_decay"),
        ("model.seed", "train.seed"),
        ("steps", "train.steps"),
    ],
)
def test_unknown_key_is_answered_with_what_was_meant(wrong: str, meant: str, refused: Refused) -> None:
    refused(["train", f"{wrong}=1"], f"unknown key '{wrong}'; the nearest is '{meant}'")


def test_names_of_other_frameworks_lead_to_keys() -> None:
    assert set(SYNONYMS.values()) <= {*leaf_keys(Config), "schedule"}
    assert not set(SYNONYMS) & {key.rpartition(".")[2] for key in leaf_keys(Config)}


@pytest.mark.parametrize(
    ("word", "meant"),
    [("trian", "train"), ("exprot", "export"), ("genrate", "generate"), ("fit", "train"), ("--trian", "train")],
)
def test_unknown_verb_is_answered_with_the_nearest(word: str, meant: str, refused: Refused) -> None:
    refused([word], f"unknown verb '{word}'", f"did you mean {meant}?")


def test_a_key_in_the_place_of_the_verb_is_explained(refused: Refused) -> None:
    refused(["model=debug"], "a verb comes first", "longcat train model=debug")
    refused(["fly"], "use one of train, ")


@pytest.mark.parametrize("word", ["--version", "-V", "version"])
def test_the_version_is_printed(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert longcat([word]) == 0
    assert capsys.readouterr().out == f"longcat {__version__}\n"


# ------------------------------------------------------------------------------------------- configuration


def test_cfg_job_prints_the_composed_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert longcat(["train", "experiment=quickstart", "optim.lr=1e-4", "--cfg", "job"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["model"]["name"], shown["optim"]["lr"], shown["run"]["name"]) == ("debug", 1e-4, "quickstart")


@pytest.mark.parametrize("words", [["train", "--cfg", "job"], ["completion", "bash"]], ids=" ".join)
def test_a_reader_that_stops_early_is_no_error(words: list[str]) -> None:
    """As in `longcat train --cfg job | head -1`."""
    command = [sys.executable, "-m", "launch", *words]
    read, write = os.pipe()
    os.close(read)
    answer = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (answer.returncode, answer.stderr) == (0, "")


def test_cfg_of_something_else_is_refused(refused: Refused) -> None:
    refused(["train", "--cfg", "hydra"], "--cfg hydra is not known", "--cfg job")
    refused(["train", "-m", "--cfg", "job", "model=debug,tiny"], "leave out -m")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder outside the checkout, which is the current one, with `conf/experiment/mine.yaml`."""
    monkeypatch.chdir(tmp_path)
    for folder, steps in (("conf", 77), ("other's ü", 88)):
        (tmp_path / folder / "experiment").mkdir(parents=True)
        text = f"# @package _global_\ndefaults:\n  - override /model: debug\ntrain:\n  steps: {steps}\n"
        (tmp_path / folder / "experiment" / "mine.yaml").write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ([], 77),
        (["--config-dir", "other's ü"], 88),
        (["--config-dir=other's ü"], 88),
        (["-cd", "other's ü"], 88),
    ],
)
def test_own_experiments_are_found_outside_the_checkout(words: list[str], steps: int, own: Path) -> None:
    config = compose(["experiment=mine", *words])
    assert (config.train.steps, config.model.name) == (steps, "debug")


def test_wrong_own_experiments_are_refused(own: Path, refused: Refused) -> None:
    refused(["train", "--config-dir", "nowhere"], "--config-dir nowhere is no folder")
    refused(["train", "experiment=yours"], "'experiment/yours'", f"use {', '.join(sorted([*EXPERIMENTS, 'mine']))}")
    (own / "conf" / "experiment" / "loose.yaml").write_text("train: {steps: 5}\n")
    refused(["train", "experiment=loose"], "# @package _global_")
    (own / "conf" / "experiment" / "typo.yaml").write_text("# @package _global_\ntrain: {stpes: 5}\n")
    refused(["train", "experiment=typo"], "stpes")
    (own / "conf" / "experiment" / "latin.yaml").write_bytes(b"# @package _global_\n# caf\xe9\n")
    refused(["train", "experiment=latin"], "is not UTF-8, after '# @package _global_\\n# caf'", "save it as UTF-8")
    (own / "conf" / "experiment" / "itself.yaml").write_text("# @package _global_\ndefaults:\n  - itself\n")
    refused(["train", "experiment=itself"], "an entry of a defaults list leads back to itself")
    (own / "conf" / "experiment" / "broken.yaml").write_text("# @package _global_\ntrain: {steps: [\n")
    refused(["train", "experiment=broken"], "broken.yaml")
    (own / "conf" / "model").mkdir()
    (own / "conf" / "model" / "tiny.yaml").write_text("hidden_size: 8\n")
    refused(["train", "experiment=mine"], "conf/model/tiny.yaml", "built-in choice", "rename")


# ------------------------------------------------------------------------------------------- check


def test_check_shows_sizes_memory_and_data(
    overrides: list[str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(tmp_path)
    assert longcat(["check", *overrides, "run.num_processes=2"]) == 0
    shown = capsys.readouterr().out
    for part in ("parameters", "memory needed", str(corpus), "2 (fsdp 2)", "new"):
        assert part in shown
    assert contents(tmp_path) == before, "check writes nothing"


def test_check_counts_the_ranks_of_all_nodes(
    overrides: list[str], refused: Refused, capfd: pytest.CaptureFixture[str]
) -> None:
    nodes = ["launch.nodes=2", "launch.rendezvous=a:29500", "run.num_processes=2", "train.global_batch_size=8"]
    assert longcat(["check", *overrides, *nodes]) == 0
    assert "4 (fsdp 4)" in capfd.readouterr().out
    refused(["check", *overrides, *nodes, "launch.nodes=3"], "6 data-parallel ranks")


def test_check_counts_padding(
    overrides: list[str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of packed samples: the share of padding and the tokens of text, from the corpus; it writes no index."""
    before = contents(tmp_path), contents(corpus.parent)
    packed = ["data.packing=best_fit", "data.mask_documents=true"]
    assert longcat(["check", *overrides, *packed]) == 0
    shown = capsys.readouterr().out
    share = re.search(r"padding +(\d+\.\d\d)% of the positions, by the sample index", shown)
    text = re.search(r"text +(\S+) tokens; (\S+) epochs of (\S+) samples", shown)
    assert share and text
    assert "fewer where a sample holds several documents" in shown
    assert (contents(tmp_path), contents(corpus.parent)) == before, "check writes nothing"
    config = compose([*overrides, *packed])
    found = find_padding(config)
    train = config.train
    assert share[1] == f"{100 * found.share:.2f}" and 0 < found.share < 0.5
    assert text[1] == human(train.steps * train.global_batch_size * train.sequence_length * (1 - found.share))
    assert text[2] == f"{train.steps * train.global_batch_size / found.num_samples:.3g}"
    assert longcat(["check", *overrides]) == 0
    assert "of the positions" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["model=flash", "model.vocab_size=131072"], ["would need at least", "this machine has"]),
        (["data.paths=[nowhere/corpus]"], ["nowhere/corpus", "build it"]),
        (["model.vocab_size=100"], ["token id", "model.vocab_size=100"]),
        (["run.num_processes=3"], ["data-parallel ranks"]),
        (["model.top_k=99"], ["model.top_k=99"]),
    ],
    ids=["memory", "no-corpus", "vocabulary", "layout", "sizes"],
)
def test_check_refuses_what_training_would(
    words: list[str], parts: list[str], overrides: list[str], refused: Refused, tmp_path: Path
) -> None:
    before = contents(tmp_path)
    refused(["check", *overrides, *words], *parts)
    assert contents(tmp_path) == before


# ------------------------------------------------------------------------------------------- completion


def complete(line: str, folder: Path) -> set[str]:
    """What bash offers for ``line`` with the printed script."""
    asks = (
        'source "$0"; COMP_LINE=$1; COMP_POINT=${#1}; COMP_WORDBREAKS=" "; COMPREPLY=(); _longcat; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    (folder / "script").write_text(script_for("bash"))
    answer = subprocess.run(
        ["bash", "-c", asks, str(folder / "script"), line], cwd=folder, capture_output=True, text=True, check=True
    )
    return set(answer.stdout.split())


def script_for(shell: str) -> str:
    from launch.completion import script

    return script(shell, VERBS)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_verbs_keys_and_choices(own: Path) -> None:
    assert complete("longcat ", own) == {*VERBS, "--help", "--version"}
    assert complete("longcat tra", own) == {"train", "transfer"}
    assert complete("longcat train optim.lr", own) >= {"optim.lr=", "optim.lr_scale.router="}
    assert complete("longcat train model=", own) >= {"model=debug", "model=flash"}
    assert complete("longcat train model=debug parallel.sch", own) == {
        f"parallel.schedule={name}" for name in ("zbv", "1f1b", "interleaved", "dualpipev")
    }
    experiments = {f"experiment={name}" for name in (*EXPERIMENTS, "mine")}
    assert complete("longcat train experiment=", own) == experiments
    assert complete("longcat checkpoint ", own) == {"list", "verify"}
    assert "build" in complete("longcat data ", own)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_get_the_same_words(shell: str) -> None:
    written = script_for(shell)
    assert all(word in written for word in ("model=debug", "optim.lr=", "generate", "parallel.schedule=1f1b"))


def test_completion_of_another_shell_is_refused(refused: Refused) -> None:
    refused(["completion"], "needs the name of a shell", "bash, zsh or fish")
    refused(["completion", "tcsh"], "'tcsh'", "bash, zsh, fish")
