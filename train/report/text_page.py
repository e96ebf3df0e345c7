"""Real text with each token coloured by the number of FFN experts that it used."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from html import escape
from typing import Any

import numpy as np

from train.report.numbers import exact, plain
from train.report.reading import RunData

MAX_TOKENS = 8000
SIDES = 4  # colour levels on either side of the neutral one
RARE = 3  # a token's average is quoted from this many occurrences on
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def text_section(run: RunData) -> str:
    """Return the coloured documents with a legend; empty without text.json."""
    values = np.array([_value(v) for d in run.documents for v in d["ffn_experts"]])
    finite = values[np.isfinite(values)]
    if not len(finite):
        return ""
    centre = run.number("model.expected_ffn_experts") or float(finite.mean())
    span = max(float(np.quantile(np.abs(finite - centre), 0.97)), 1e-6)
    shown, bodies = 0, []
    for document in run.documents:
        if shown >= MAX_TOKENS:
            break
        pieces, counts = (
            document["pieces"][: MAX_TOKENS - shown],
            document["ffn_experts"][: MAX_TOKENS - shown],
        )
        shown += len(pieces)
        spans = (token(str(p), _value(v), centre, span) for p, v in zip(pieces, counts, strict=True))
        bodies.append(f'<pre class="tokens">{"".join(spans)}</pre>')
    cut = f" The first {shown:,} of {len(values):,} tokens are shown." if shown < len(values) else ""
    return (
        f"<p>{escape(text_sentence(run, finite))}{cut}</p>"
        f"<p class=legend>{legend(centre, span)} FFN experts per token, mean over layers; "
        f"the middle is {exact(centre)}. Hover over a token for its number.</p>{''.join(bodies)}"
    )


def token(piece: str, value: float, centre: float, span: float) -> str:
    """Return one token as a coloured span whose title is the number; a line feed shows a faint mark."""
    text = escape(_CONTROL.sub("�", piece.replace("\r\n", "\n").replace("\r", "\n")))
    if not math.isfinite(value):
        return f"<span>{text}</span>"
    level = round(max(-1.0, min(1.0, (value - centre) / span)) * SIDES)
    mark = " nl" if "\n" in text and not text.strip() else ""
    return f'<span class="{_level(level)}{mark}" title="{value:.2f}">{text}</span>'


def text_sentence(run: RunData, values: Any) -> str:
    """Say the mean and the range, and which frequent tokens use most and least."""
    text = f"The tokens use {values.mean():.2f} FFN experts on average, "
    text += f"from {values.min():.2f} to {values.max():.2f}."
    means = frequent_means(run)
    if len(means) >= 6:
        least = ", ".join(f"{_quoted(piece)} {mean:.2f}" for piece, mean in means[:3])
        most = ", ".join(f"{_quoted(piece)} {mean:.2f}" for piece, mean in reversed(means[-3:]))
        text += f" Of the frequent ones, most go to {most}; least to {least}."
    return text


def frequent_means(run: RunData) -> list[tuple[str, float]]:
    """Return (token, mean FFN experts) of the tokens that occur at least `RARE` times, ascending."""
    seen: dict[str, list[float]] = defaultdict(list)
    for document in run.documents:
        for piece, value in zip(document["pieces"], document["ffn_experts"], strict=True):
            if math.isfinite(_value(value)):
                seen[str(piece).strip(" ")].append(_value(value))
    means = [(piece, sum(v) / len(v)) for piece, v in seen.items() if piece and len(v) >= RARE]
    return sorted(means, key=lambda pair: pair[1])


def legend(centre: float, span: float) -> str:
    """Return the colour scale with its numbers."""
    cells = "".join(f'<b class="{_level(level)}"></b>' for level in range(-SIDES, SIDES + 1))
    low, high = max(0.0, centre - span), centre + span
    return f"<span class=key><i>{plain(low, 2)} or fewer</i>{cells}<i>{plain(high, 2)} or more</i></span>"


def _level(level: int) -> str:
    return f"u{-level}" if level < 0 else f"o{level}"


def _quoted(piece: str) -> str:
    shown = _CONTROL.sub("�", piece).replace("\n", "↵").replace("\t", "⇥")
    return f"“{shown[:24]}”"


def _value(value: Any) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
