"""The documentation is current: keys and defaults, links, file paths, command lines."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.house import reference
from train.compose import compose, leaf_keys
from train.config import Config

ROOT = Path(__file__).resolve().parents[2]
DEFAULTS = compose([])
KEYS = (ROOT / "docs" / "reference" / "keys.md").read_text(encoding="utf-8")


def _value(config: Config, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


def test_the_page_of_keys_is_current() -> None:
    assert reference.page() == KEYS, "docs/reference/keys.md is out of date; run `make reference`"


@pytest.mark.parametrize("key", leaf_keys(Config))
def test_key_is_on_the_page_with_default_and_meaning(key: str) -> None:
    row = re.search(rf"^\| `{re.escape(key)}` \| [^|]+ \| `([^`]*)` \| (.*) \|$", KEYS, re.MULTILINE)
    assert row is not None, f"docs/reference/keys.md has no row for {key}"
    default = _value(DEFAULTS, key)
    assert isinstance(default, bool) or not isinstance(default, int | float) or float(row[1]) == default
    assert row[2], f"{key} has no comment in its dataclass"
