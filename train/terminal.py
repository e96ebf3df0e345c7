"""The lines that a person watches while a model trains: a panel, then one line per logged step."""

from __future__ import annotations

import math
import re
import shutil
import statistics
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from train.process.lasting_streams import LastingStream
from train.run_dir.files import LineFile

HEADER_EVERY = 20
IMBALANCED = 2.0  # busiest expert over mean from which the balance is coloured as a warning
DASH = "–"
PACE_STEPS = 31  # the ETA uses the median of so many steps, which the slow first one hardly moves
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
ALARMS = ("nan", "inf", "-inf")
_ASCII = str.maketrans({"–": "-", "─": "-", "│": "|", "╭": "+", "╮": "+", "╰": "+", "╯": "+", "±": "~", "×": "x"})

Writer = Callable[[Mapping[str, Any]], tuple[str, str]]  # metrics -> text and style


@dataclass(frozen=True)
class Column:
    """One column: heading, width, how metrics become text and style, and when it may be dropped."""

    heading: str
    width: int
    write: Writer
    rank: int  # the highest rank leaves first where the terminal is narrow


class Display(Protocol):
    """Where a run reports its progress to a person."""

    def header(self, lines: list[tuple[str, str]]) -> None:
        """(name, value) pairs: what was derived from the configuration."""

    def step(self, metrics: Mapping[str, Any]) -> None:
        """The metrics of one step."""

    def validation(self, step: int, loss: float, bits_per_byte: float, by_corpus: Mapping[str, float]) -> None:
        """A validation result: nats per token, bits per byte, and nats per token of each corpus."""

    def note(self, text: str) -> None:
        """A remark, such as a checkpoint that was written."""

    def close(self) -> None:
        """After the last line."""


class SilentTerminal:
    """The display of every rank but the first: it prints nothing."""

    def header(self, lines: list[tuple[str, str]]) -> None: ...

    def step(self, metrics: Mapping[str, Any]) -> None: ...

    def validation(self, step: int, loss: float, bits_per_byte: float, by_corpus: Mapping[str, float]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class Terminal:
    """Prints the progress of a run, coloured on a terminal, plain and unwrapped in a file or a pipe.

    Neither a stream whose reader is gone nor a full disk ends the run: the lines that can be written are.

    Args:
        expected_ffn_experts: K_e of the model.
        top_k: K of the model.
        stream: standard output unless given.
        log: path of a file that gets the same lines without colour.
        num_ranks: with several, a column shows the share of a step that ranks wait for each other.
    """

    def __init__(
        self,
        total_steps: int,
        expected_ffn_experts: float,
        top_k: int,
        stream: TextIO | None = None,
        log: Path | None = None,
        num_ranks: int = 1,
    ) -> None:
        self.total_steps, self.num_ranks = total_steps, num_ranks
        self.expected = expected_ffn_experts
        self.top_k = top_k
        stream = stream if stream is not None else sys.stdout
        self.stream: Any = stream if isinstance(stream, LastingStream) else LastingStream(stream)
        self._told_lost = False
        self._lines = 0
        self._seconds: deque[float] = deque(maxlen=PACE_STEPS)
        self._shown: list[Column] = []
        self._columns = self._all_columns()
        self._unicode = _can_encode(self.stream, "–╭│±×")
        self._paint = _painter(self.stream)
        self.log: LineFile | None = None  # LineFile may call _show, which reads it
        if log is not None:
            self.log = LineFile(log, self._show)

    def header(self, lines: list[tuple[str, str]]) -> None:
        """Print a panel of (name, value) pairs."""
        if not lines:
            return
        left = max(len(name) for name, _ in lines)
        width = self._width()
        rows: list[tuple[str, str]] = []
        for name, value in lines:
            pieces = _wrap(value, max(12, width - left - 6)) if width else [value]
            rows += [(name if first == 0 else "", piece) for first, piece in enumerate(pieces)]
        right = max(len(value) for _, value in rows)
        edge = "─" * (left + right + 4)
        self._print(self._paint(f"╭{edge}╮", "dim"))
        side = self._paint("│", "dim")
        for name, value in rows:
            self._print(f"{side} {self._paint(name.ljust(left), 'dim')}  {value.ljust(right)} {side}")
        self._print(self._paint(f"╰{edge}╯", "dim"))

    def step(self, metrics: Mapping[str, Any]) -> None:
        """Print one line per step; a missing or null metric shows as a dash."""
        seconds = _number(metrics, "step_seconds")
        if seconds is not None and math.isfinite(seconds):
            self._seconds.append(seconds)
        if self._lines % HEADER_EVERY == 0:
            self._shown = _fitting(self._columns, self._width())
            headings = "  ".join(column.heading.rjust(column.width) for column in self._shown)
            self._print(self._paint(headings, "dim"))
        self._lines += 1
        cells = []
        for column in self._shown:
            text, style = column.write(metrics)
            cells.append(self._paint(text.rjust(column.width), "bold red" if text in ALARMS else style))
        self._print("  ".join(cells))

    def validation(self, step: int, loss: float, bits_per_byte: float, by_corpus: Mapping[str, float]) -> None:
        """Print a validation result (nats per token, also by corpus, and bits per byte) on a line of its own."""
        text = f"validation at step {step:,}: loss {_fixed(loss, 4)}, {_fixed(bits_per_byte, 4)} bits per byte"
        if by_corpus:
            text += f" ({', '.join(f'{name} {_fixed(one, 4)}' for name, one in by_corpus.items())})"
        self._print(self._paint(text, "bold cyan" if math.isfinite(loss) else "bold red"))

    def note(self, text: str) -> None:
        """Print a remark, such as a checkpoint that was written."""
        self._print(self._paint(text, "cyan"))

    def _all_columns(self) -> list[Column]:
        def plain(key: str, write: Callable[[float | None], str], style: str = "") -> Writer:
            return lambda metrics: (write(_number(metrics, key)), style)

        step_width = max(4, 2 * len(str(self.total_steps)) + 1)
        waiting = [Column("waits", 6, plain("exposed_comm_share", _percent), 7)] if self.num_ranks > 1 else []
        return [
            Column("step", step_width, self._step_cell, 0),
            Column("loss", 7, plain("loss", lambda value: _fixed(value, 4), "bold"), 0),
            Column("lr", 8, plain("lr", _exponent, "dim"), 8),
            Column("tok/s", 7, plain("tokens_per_second", _count), 4),
            Column("MFU", 6, plain("mfu", _percent), 5),
            *waiting,
            Column(f"FFN of {self.top_k}", 12, self._experts_cell, 1),
            Column("max/mean", 8, self._balance_cell, 6),
            Column("grad", 7, plain("grad_norm", _significant), 3),
            Column("ETA", 7, self._time_left, 2),
        ]

    def _step_cell(self, metrics: Mapping[str, Any]) -> tuple[str, str]:
        step = _number(metrics, "step")
        return (DASH if step is None else f"{step:.0f}/{self.total_steps}"), ""

    def _experts_cell(self, metrics: Mapping[str, Any]) -> tuple[str, str]:
        """FFN experts per token and the deviation from K_e: green within 1 %, yellow past 5 %."""
        value = _number(metrics, "ffn_experts_per_token")
        if value is None or not math.isfinite(value) or not self.expected:
            return _fixed(value, 2), ""
        off = value / self.expected - 1
        style = "green" if abs(off) <= 0.01 else "yellow" if abs(off) > 0.05 else ""
        return f"{value:.2f} {100 * off:+.1f}%", style

    def _balance_cell(self, metrics: Mapping[str, Any]) -> tuple[str, str]:
        value = _number(metrics, "expert_load_max_over_mean")
        return _fixed(value, 2), "yellow" if value is not None and value > IMBALANCED else ""

    def _time_left(self, metrics: Mapping[str, Any]) -> tuple[str, str]:
        step = _number(metrics, "step")
        if step is None or not self._seconds:
            return DASH, "dim"
        return _duration((self.total_steps - step) * statistics.median(self._seconds)), "dim"

    def _width(self) -> int | None:
        """The columns of the terminal; None where lines are not wrapped."""
        return shutil.get_terminal_size().columns if _is_terminal(self.stream) else None

    def close(self) -> None:
        """Close the log."""
        if self.log is not None:
            self.log.close()

    def _print(self, text: str) -> None:
        if self.log is not None:
            self.log.write(_STYLE.sub("", text))
        self._show(text)

    def _show(self, text: str) -> None:
        """Print a line to the stream alone."""
        self.stream.write((text if self._unicode else _to_ascii(text, self.stream)) + "\n")
        self.stream.flush()
        if self.stream.lost is not None and self.log is not None and not self._told_lost:
            self._told_lost = True
            reason = getattr(self.stream.lost, "strerror", None) or self.stream.lost
            self.log.write(f"nobody reads standard output any more ({reason}); training continues, its lines are here")


def _painter(stream: Any) -> Callable[[str, str], str]:
    """paint(text, style) by rich's rules (NO_COLOR, TERM); off a terminal it returns the text."""
    if not _is_terminal(stream):
        return lambda text, style: text
    from rich.color import ColorSystem
    from rich.console import Console
    from rich.style import Style

    console = Console(file=stream)
    if console.color_system is None or console.no_color:
        return lambda text, style: text
    known = {name: Style.parse(name) for name in ("dim", "bold", "green", "yellow", "cyan", "bold cyan", "bold red")}

    def paint(text: str, style: str) -> str:
        return known[style].render(text, color_system=ColorSystem.STANDARD) if style else text

    return paint


def _is_terminal(stream: Any) -> bool:
    return bool(getattr(stream, "isatty", lambda: False)())


def _can_encode(stream: Any, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _to_ascii(text: str, stream: Any) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.translate(_ASCII).encode(encoding, errors="replace").decode(encoding)


def _fitting(columns: list[Column], width: int | None) -> list[Column]:
    """Drop the least important columns until a line fits into `width`."""
    kept = list(columns)
    while width is not None and len(kept) > 1 and sum(c.width + 2 for c in kept) - 2 > width:
        kept.remove(max(kept, key=lambda column: column.rank))
    return kept


def _wrap(text: str, width: int) -> list[str]:
    import textwrap

    return textwrap.wrap(text, width) or [""]


def _number(metrics: Mapping[str, Any], key: str) -> float | None:
    value = metrics.get(key)
    return None if value is None else float(value)


def _formatted(value: float | None, form: str) -> str:
    """The number in a format, a dash for None, `nan` and `inf` as they are."""
    if value is None:
        return DASH
    return format(value, form) if math.isfinite(value) else str(value)


def _fixed(value: float | None, decimals: int) -> str:
    return _formatted(value, f".{decimals}f")


def _significant(value: float | None) -> str:
    return _formatted(value, ".3f" if value is None or value == 0 or 0.001 <= abs(value) < 1000 else ".1e")


def _exponent(value: float | None) -> str:
    return _formatted(value, ".2e")


def _percent(value: float | None) -> str:
    return _formatted(value, ".1%")


def _count(value: float | None) -> str:
    if value is not None and math.isfinite(value):
        for scale, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
            if value >= scale:
                return f"{value / scale:.1f}{suffix}"
    return _formatted(value, ".0f")


def _duration(seconds: float) -> str:
    rounded = max(0, round(seconds))
    if rounded < 60:
        return f"{rounded}s"
    if rounded < 3600:
        return f"{rounded // 60}m{rounded % 60:02d}s"
    if rounded < 100 * 3600:
        return f"{rounded // 3600}h{rounded % 3600 // 60:02d}m"
    return f"{rounded // 86400}d{rounded % 86400 // 3600:02d}h"
