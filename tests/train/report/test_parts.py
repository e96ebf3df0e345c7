"""The parts of the report: numbers, ticks, downsampling, colours of maps and tokens, comparison."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longcat.errors import ConfigError
from tests.support.fabricate_run import fabricate
from tests.train.report.html_page import read
from train.report import write_comparison
from train.report.curves import downsample, first_below, settled_from
from train.report.heatmap import LEVELS, LIGHT, palette, png, to_levels
from train.report.numbers import (
    compact,
    duration,
    exact,
    linear_ticks,
    log_ticks,
    percent,
    plain,
    tick_formatter,
)
from train.report.routing import layer_levels
from train.report.text_page import token


@pytest.mark.parametrize(
    ("written", "wanted"),
    [
        (compact(1_200_000), "1.2M"),
        (compact(999_960), "1M"),
        (compact(8192), "8.19k"),
        (compact(2e13), "20T"),
        (plain(1.8949), "1.89"),
        (plain(3.1e-5), "3.10e−5"),
        (plain(float("nan")), "–"),
        (exact(4.0), "4"),
        (exact(1e-16), "1e−16"),
        (percent(0.0841), "8.41\u202f%"),
        (duration(45), "45\u202fs"),
        (duration(7260), "2\u202fh 1\u202fmin"),
        (duration(187_200), "2\u202fd 4\u202fh"),
    ],
)
def test_numbers_are_written_for_people(written: str, wanted: str) -> None:
    assert written == wanted


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e9))
def test_ticks_are_few_inside_and_distinct(low: float, span: float) -> None:
    high = low + span
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        return
    ticks = linear_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    assert all(low - span * 1e-6 <= tick <= high + span * 1e-6 for tick in ticks)


@given(st.floats(1e-9, 1e3), st.floats(1.05, 1e9))
def test_logarithmic_ticks_are_few_and_inside(low: float, factor: float) -> None:
    ticks = log_ticks(low, low * factor)
    assert 1 <= len(ticks) <= 8
    assert all(low * (1 - 1e-6) <= tick <= low * factor * (1 + 1e-6) for tick in ticks)


@pytest.mark.parametrize("ticks", [[0, 0.001, 0.002], [0, 2.5e6, 5e6, 7.5e6], [1e-5, 1e-4, 1e-3], [1.5, 2, 2.5]])
def test_neighbouring_ticks_read_differently(ticks: list[float]) -> None:
    write = tick_formatter(ticks)
    assert len({write(tick) for tick in ticks}) == len(ticks)


def test_downsampling_keeps_extremes_and_the_steep_start() -> None:
    y = np.exp(-np.arange(100_000) / 2000) + 1
    y[54_321] = 40.0
    curve = downsample(np.arange(100_000.0), y)
    assert len(curve.x) == 400
    assert curve.high.max() == 40.0 and curve.low.min() == y.min()
    assert curve.mean[0] == pytest.approx(y[:250].mean())
    assert np.all(np.diff(curve.x) > 0)


def test_a_short_exact_series_is_drawn_as_it_is() -> None:
    y = np.array([3.0, 1.0, 2.0])
    curve = downsample(np.arange(3.0), y, exact=True)
    assert np.array_equal(curve.mean, y) and not curve.has_envelope


def test_settling_time_is_the_last_entry_into_the_band() -> None:
    y = np.array([5.0, 4.0, 5.0, 4.02, 3.98])
    x = np.arange(5.0)
    assert settled_from(x, y, 3.96, 4.04) == 3.0
    assert settled_from(x, y + 1, 3.96, 4.04) is None
    assert first_below(x, y, 4.01) == 1.0 and first_below(x, y, 1.0) is None


def test_map_colours_are_symmetric_around_one() -> None:
    middle = LEVELS // 2
    assert to_levels(np.array([1.0]))[0] == middle
    assert to_levels(np.array([2.0, 8.0])).tolist() == [LEVELS - 1] * 2
    assert to_levels(np.array([0.5, 0.0])).tolist() == [0, 0]
    assert tuple(palette(LIGHT)[middle]) == LIGHT[1]


def test_png_decodes_to_what_was_encoded() -> None:
    levels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    content = png(levels, palette(LIGHT))
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    chunks, at = {}, 8
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert struct.unpack(">I", content[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        chunks[kind] = body
        at += 12 + length
    assert struct.unpack(">II", chunks[b"IHDR"][:8]) == (4, 3)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), dtype=np.uint8).reshape(3, 5)
    assert np.array_equal(rows[:, 1:], levels)


def test_load_map_shows_identity_experts_and_a_hot_expert() -> None:
    counts = np.full((5, 130), 100.0)
    counts[:, 77] = 900.0
    counts[:, 128:] = 6400.0
    levels = layer_levels(counts, ffn=128, identity=12800 / counts[0].sum())
    experts = levels[: 128 // 2]
    assert (experts.max(axis=1) == LEVELS - 1).nonzero()[0].tolist() == [77 // 2]
    assert (levels[-1] == LEVELS // 2).all()


def test_token_colour_follows_its_experts() -> None:
    assert 'class="o4" title="6.00"' in token("x", 6.0, 4.0, 2.0)
    assert 'class="u4" title="0.50"' in token("x", 0.5, 4.0, 2.0)
    assert 'class="o0 nl"' in token("\n\n", 4.0, 4.0, 2.0)
    assert token("&", float("nan"), 4.0, 2.0) == "<span>&amp;</span>"
    assert "\x00" not in token("\x00", 4.0, 4.0, 2.0)


def test_comparison_shows_differences_results_and_curves(tmp_path: Path) -> None:
    first = fabricate(tmp_path / "pid", steps=200)
    second = fabricate(tmp_path / "sign", steps=200, seed=1, settings={"balance.method": "sign"}, floor=2.2)
    html, page = read(write_comparison([first, second], tmp_path / "out" / "comparison.html"))
    assert "Lowest validation loss: A pid" in page.text
    assert "balance.method" in page.text and "optim.lr" not in page.text
    for head in ("Training loss", "Validation loss", "FFN experts per token", "Gradient norm", "Throughput"):
        assert head in page.heads
    assert "http" not in html


def test_comparison_of_unequal_runs_says_what_is_missing(tmp_path: Path) -> None:
    first = fabricate(tmp_path / "whole", steps=50)
    second = fabricate(tmp_path / "empty", steps=50, settings={"model.top_k": 8})
    (second / "metrics.jsonl").write_text("")
    page = read(write_comparison([first, second], tmp_path / "comparison.html"))[1]
    assert "Not every run has a loss to compare" in page.text
    assert "model.top_k" in page.text and "Training loss" in page.heads


def test_comparison_of_many_runs_stays_small(tmp_path: Path) -> None:
    runs = [fabricate(tmp_path / f"run{n}", steps=500, seed=n, extras=False, routing_rows=0) for n in range(12)]
    target = write_comparison(runs, tmp_path / "comparison.html")
    assert target.stat().st_size < 3_000_000
    assert "L run11" in read(target)[1].text or "run11" in read(target)[1].text


def test_comparison_refuses_a_single_run(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least two runs"):
        write_comparison([fabricate(tmp_path / "run", steps=3)], tmp_path / "comparison.html")
