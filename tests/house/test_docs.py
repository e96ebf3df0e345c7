"""The user guide names every key of the configuration with the default that it has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from train.compose import compose, leaf_keys
from train.config import Config

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "user_guide.md"


def documented() -> dict[str, str]:
    """key → default as written, of the rows between the two markers."""
    part = GUIDE.read_text().partition("<!-- keys: begin -->")[2].partition("<!-- keys: end -->")[0]
    return dict(re.findall(r"^\| `([a-z_.]+)` \| `?([^|`]*)`? \|", part, re.MULTILINE))


def value(config: Config, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


@pytest.mark.parametrize("key", leaf_keys(Config))
def test_key_is_in_the_user_guide_with_its_default(key: str) -> None:
    written, default = documented().get(key), value(compose([]), key)
    assert written is not None, f"docs/user_guide.md has no row for {key}"
    if isinstance(default, bool) or default is None:
        assert written == {True: "true", False: "false", None: "null"}[default]
    elif isinstance(default, int | float):
        assert float(written) == default
    else:
        assert written == str(default).replace("'", "")


def test_the_user_guide_invents_no_key() -> None:
    assert documented().keys() <= set(leaf_keys(Config))
