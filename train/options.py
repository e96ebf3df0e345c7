"""The keys of a verb that trains nothing: `key=value` words into a typed dataclass."""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar

from longcat.errors import ConfigError
from train.compose import leaf_keys, one_line

Kind = TypeVar("Kind")


def compose_options(kind: type[Kind], words: list[str]) -> Kind:
    """Words in Hydra's grammar over the defaults of the dataclass ``kind``, which is then asked to `validate` itself.

    Raises:
        ConfigError: an unknown key (with the nearest one), a wrong type, or values that cannot be.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    keys = sorted(leaf_keys(kind))
    tree = OmegaConf.structured(kind)
    for word in words:
        if not re.match(r"[\w.]+=", word):
            raise ConfigError(f"{word!r} is no override; write key=value, for instance {keys[0]}=…")
        key = word.partition("=")[0]
        if key not in keys:
            nearest = difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
            raise ConfigError(f"unknown key {key!r}; the nearest is {nearest[0]!r}")
        try:
            override = OverridesParser.create().parse_override(word)
            if override.is_sweep_override():
                raise ConfigError(f"{word}: several values are for `longcat train -m`; give one")
            OmegaConf.update(tree, key, override.value())
        except HydraException as error:
            raise ConfigError(one_line(error)) from error
        except OmegaConfBaseException as error:
            raise ConfigError(f"{word}: {str(error).splitlines()[0]}") from error
    options: Any = OmegaConf.to_object(tree)
    options.validate()
    return options  # type: ignore[no-any-return]
