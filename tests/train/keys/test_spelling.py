"""Names and paths that look like numbers stay as they are spelt."""

from __future__ import annotations

import pytest

from train.compose import compose
from train.keys.spelling import keep_spelling, text_keys


@pytest.mark.parametrize(
    "name", ["1e-3", "007", "1_000", "1.", "+1", "true", "False", "nan", "null", "1E5", "0x10", "2026-11-28"]
)
def test_run_name_is_kept_as_spelt(name: str) -> None:
    assert compose([f"run.name={name}", f"run.dir={name}"]).run.folder.parts == (name, name)


def test_null_is_no_text_where_a_key_may_be_empty() -> None:
    assert compose(["logging.wandb_group=null"]).logging.wandb_group is None
    assert compose(["logging.wandb_group=1e3"]).logging.wandb_group == "1e3"


@pytest.mark.parametrize(
    "override", ["optim.lr=1e-3", "run.name=a", "run.name='1e-3'", "train.deterministic=true", "model=tiny"]
)
def test_other_overrides_are_left_alone(override: str) -> None:
    assert keep_spelling(override) == override


def test_text_keys_are_found_in_every_section() -> None:
    assert {"run.name", "run.dir", "checkpoint.resume", "data.out", "logging.wandb_project"} <= text_keys().keys()
    assert not {"train.steps", "logging.wandb", "data.paths"} & text_keys().keys()


@pytest.mark.parametrize(
    "path",
    [
        "texts (1)",
        "it's",
        'say "it"',
        "{a",
        "a}b",
        "br{a}c[0]e",
        "a\\'b",
        "ü\\x",
        "C:\\x (1)",
        "ü\\",
        "do${x",
        "ü=\\\\",
    ],
)
def test_paths_with_signs_of_hydras_grammar_are_text(path: str) -> None:
    config = compose([f"data.source={path}", f"run.dir={path}"])
    assert (config.data.source, config.run.dir) == (path, path)


def test_quotes_and_interpolations_keep_their_meaning() -> None:
    config = compose(["run.name=a", "data.source='texts (1)'", "run.dir=${run.name}"])
    assert (config.data.source, config.run.dir) == ("texts (1)", "a")
