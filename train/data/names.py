"""Names of corpora for metrics and pages, from their prefixes."""

from __future__ import annotations

import itertools
from pathlib import PurePath

USUAL = "corpus"  # file name of a corpus that `longcat data build` wrote; its folder has the name then


def corpus_names(prefixes: list[str]) -> list[str]:
    """A short name for each prefix, different for all of them.

    It is the last part of the prefix, or the folder's name where that part is only `corpus`. Where two are equal, the
    folders before it are put in front, and for a prefix that occurs twice its number.
    """
    parts = [_parts(prefix) for prefix in prefixes]
    names = [own[-1] for own in parts]
    for depth in range(2, max(map(len, parts), default=0) + 1):
        twice = {name for name in names if names.count(name) > 1}
        names = ["-".join(own[-depth:]) if name in twice else name for own, name in zip(parts, names, strict=True)]
    twice = {name for name in names if names.count(name) > 1}
    taken = set(names)
    for place, name in enumerate(names):
        if name in twice:
            numbers = (f"{name}-{number}" for number in itertools.count(place))
            names[place] = next(other for other in numbers if other not in taken)
            taken.add(names[place])
    return names


def _parts(prefix: str) -> list[str]:
    parts = [part for part in PurePath(prefix).parts if part not in ("/", "..")]
    return parts[:-1] if len(parts) > 1 and parts[-1] == USUAL else parts or [prefix]
