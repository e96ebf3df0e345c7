"""Options of verbs beside keys of a run: a misspelt one is told by its nearest option."""

from __future__ import annotations

import pytest

from launch.options import split_options
from launch.plan.plan import Arguments
from longcat.errors import ConfigError
from train.compose import leaf_keys
from train.config import Config
from train.huggingface.import_folder import ImportOptions
from train.transfer import TransferConfig

MISSPELT = [
    (TransferConfig, "tranfer.allow=depth", "transfer.allow"),
    (TransferConfig, "transfer.alow=depth", "transfer.allow"),
    (TransferConfig, "prxy=runs/narrow", "proxy"),
    (Arguments, "pln.ranks=8", "plan.ranks"),
    (Arguments, "plan.rank=8", "plan.ranks"),
]


@pytest.mark.parametrize(("kind", "argument", "nearest"), MISSPELT)
def test_misspelt_option_is_told_its_nearest(kind: type[object], argument: str, nearest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        split_options(kind, [argument])
    assert str(caught.value) == f"unknown key {argument.partition('=')[0]!r}; the nearest is {nearest!r}"


@pytest.mark.parametrize("kind", [Arguments, TransferConfig, ImportOptions])
def test_keys_of_a_run_are_no_misspelt_options(kind: type[object]) -> None:
    words = [f"{key}=1" for key in leaf_keys(Config)] + ["model=tiny", "data=python_source", "+experiment=evidence"]
    words += [
        "++optim.lr=1",
        "optim.lr_scale.router=1",
        "data.stages.0.start_tokens=1",
        "--config-dir",
        "target",
        "proxy",
    ]
    assert split_options(kind, words)[1] == words
