"""The terminal's lines: aligned, complete, plain when redirected, narrow in a narrow terminal."""

from __future__ import annotations

import io
import os
import time

import pytest

from train.terminal import HEADER_EVERY, Terminal

METRICS = {
    "step": 41,
    "loss": 4.42837,
    "lr": 3e-3,
    "tokens_per_second": 12_831.0,
    "mfu": 0.2613,
    "ffn_experts_per_token": 4.02,
    "expert_load_max_over_mean": 1.27,
    "grad_norm": 2.2531,
    "step_seconds": 0.5,
}


class FakeTerminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def lines(stream: io.StringIO) -> list[str]:
    return stream.getvalue().splitlines()


def make(stream: io.StringIO, total: int = 1200) -> Terminal:
    return Terminal(total, expected_ffn_experts=4, top_k=6, stream=stream)


@pytest.fixture
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> FakeTerminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    return FakeTerminal()


def test_step_is_one_line_with_every_metric() -> None:
    stream = io.StringIO()
    make(stream).step(METRICS)
    heading, line = lines(stream)
    assert line.split() == [
        "41/1200",
        "4.4284",
        "3.00e-03",
        "12.8k",
        "26.1%",
        "4.02",
        "+0.5%",
        "1.27",
        "2.253",
        "9m40s",
    ]
    assert heading.split() == [
        "step",
        "loss",
        "lr",
        "tok/s",
        "MFU",
        "FFN",
        "of",
        "6",
        "max/mean",
        "grad",
        "ETA",
    ]


def test_columns_stay_aligned_and_headings_return() -> None:
    stream = io.StringIO()
    terminal = make(stream, total=100_000)
    for step in range(1, 2 * HEADER_EVERY + 1):
        terminal.step(METRICS | {"step": step * 1000, "loss": 12.0 / step, "grad_norm": 10.0 ** (step % 9 - 4)})
    printed = lines(stream)
    assert len({len(line) for line in printed}) == 1
    assert [i for i, line in enumerate(printed) if "loss" in line] == [0, HEADER_EVERY + 1]


def test_redirected_output_has_no_escapes_and_no_wrapping() -> None:
    stream = io.StringIO()
    terminal = make(stream)
    value = "AdamW " * 30
    terminal.header([("optimizer", value)])
    terminal.step(METRICS)
    terminal.validation(41, 2.5, 1.01, {"web": 2.25, "code": 2.75})
    terminal.note("checkpoint written")
    assert "\x1b" not in stream.getvalue()
    assert any(value in line for line in lines(stream))


def test_missing_values_are_dashes_and_nan_is_named() -> None:
    stream = io.StringIO()
    terminal = make(stream)
    terminal.step({"step": 1, "loss": float("nan"), "mfu": None, "grad_norm": float("inf")})
    assert lines(stream)[1].split() == ["1/1200", "nan", "–", "–", "–", "–", "–", "inf", "–"]
    terminal.step({})
    assert set(lines(stream)[2].split()) == {"–"}


def test_terminal_gets_colour_and_red_alarms(wide_terminal: FakeTerminal) -> None:
    terminal = make(wide_terminal)
    terminal.step(METRICS)
    terminal.step(METRICS | {"loss": float("nan")})
    good, bad = lines(wide_terminal)[1:]
    assert "\x1b[32m" in good and "\x1b[1;31m" not in good
    assert "\x1b[1;31m" in bad


def test_no_color_is_obeyed(wide_terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    make(wide_terminal).step(METRICS)
    assert "\x1b" not in wide_terminal.getvalue()


@pytest.mark.parametrize("width", [30, 40, 60, 80, 100])
def test_a_narrow_terminal_drops_columns_and_never_wraps(
    wide_terminal: FakeTerminal, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    terminal = make(wide_terminal)
    terminal.header([("model", "tiny " * 12), ("layout", "fsdp 2")])
    terminal.step(METRICS)
    assert max(map(len, lines(wide_terminal))) <= width
    assert "4.4284" in wide_terminal.getvalue()


def test_a_stream_without_unicode_gets_ascii() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    terminal = Terminal(10, 4, 6, stream)
    terminal.header([("rate", "3·10⁻³")])
    terminal.step({"step": 1})
    assert raw.getvalue().decode("ascii").splitlines()[-1].split()[1:] == ["-"] * 8


def test_each_line_is_flushed_at_once() -> None:
    reading, writing = os.pipe()
    with os.fdopen(writing, "w", buffering=1 << 16) as stream, os.fdopen(reading, "rb") as pipe:
        Terminal(10, 4, 6, stream).note("saved")
        assert pipe.read1() == b"saved\n"


def test_time_left_follows_the_step_time() -> None:
    stream = io.StringIO()
    terminal = make(stream, total=1000)
    for step in range(1, 101):
        terminal.step(METRICS | {"step": step, "step_seconds": 60.0 if step == 1 else 1.0})
    assert lines(stream)[-1].split()[-1] == "15m00s"


@pytest.mark.alone
def test_a_line_takes_less_than_a_millisecond() -> None:
    terminal = make(io.StringIO())
    started = time.perf_counter()
    for _ in range(500):
        terminal.step(METRICS)
    assert (time.perf_counter() - started) / 500 < 1e-3


def test_several_ranks_show_their_blocked_share() -> None:
    for num_ranks in (1, 2):
        stream = io.StringIO()
        Terminal(10, 4, 6, stream, num_ranks=num_ranks).step({**METRICS, "exposed_comm_share": 0.234})
        heading, line = lines(stream)
        assert ("waits" in heading) == ("23.4%" in line) == (num_ranks == 2)
