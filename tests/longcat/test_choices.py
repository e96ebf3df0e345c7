"""Keys with a fixed set of values: refused with the choices named, stored as plain strings."""

from __future__ import annotations

from enum import StrEnum

import pytest

from longcat.config_choices import check_choice
from longcat.errors import ConfigError


class Colour(StrEnum):
    """Three values."""

    red = "red"
    green = "green"
    blue = "blue"


def test_unknown_choice_is_refused_with_all_choices() -> None:
    check_choice("paint.colour", "green", Colour)
    with pytest.raises(ConfigError, match=r"^paint.colour=grey is not known; use red, green or blue$") as refusal:
        check_choice("paint.colour", "grey", Colour)
    assert refusal.value.exit_code == 2
