"""Numbers as a person reads them: compact counts, significant digits, durations and axis ticks."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

Formatter = Callable[[float], str]

DASH = "–"
SPACE = "\u202f"  # narrow and unbreakable, between a number and its unit
_SUFFIXES = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def plain(value: float | None, digits: int = 3) -> str:
    """Return `value` with `digits` significant digits: 1.94, 0.0123, 3.1e-5; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    magnitude = abs(value)
    if magnitude >= 1e5:
        return compact(value, digits)
    if magnitude < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        return f"{_minus(mantissa)}e{_minus(str(int(exponent)))}"
    decimals = max(0, digits - 1 - math.floor(math.log10(magnitude)))
    return _minus(f"{value:,.{decimals}f}")


def compact(value: float | None, digits: int = 3) -> str:
    """Return a count with a suffix (1,200,000 is 1.2M), trailing zeros dropped; a dash for None and NaN."""
    if value is None or math.isnan(value):
        return DASH
    if math.isinf(value):
        return plain(value)
    for scale, suffix in _SUFFIXES:
        if abs(value) >= scale * 0.99995:
            return f"{_trim(value / scale, digits)}{suffix}"
    return _trim(value, digits)


def exact(value: float | None, digits: int = 4) -> str:
    """Return a chosen value, such as a setting, without padding: 4, 0.1, 0.003, 1e-16."""
    if value is None or not math.isfinite(value):
        return plain(value)
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return _short_exponent(value) if abs(value) < 1 else compact(value, digits)
    return _trim(value, digits)


def flops(value: float) -> str:
    """Return FLOP/s with the SI prefix: 1.4e11 is 140 GFLOP/s."""
    return compact(value).replace("k", " k").replace("M", " M").replace("B", " G").replace("T", " T") + "FLOP/s"


def percent(value: float | None, digits: int = 3) -> str:
    """Return a share of one as a percentage: 0.084 is 8.4 %."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{_trim(100 * value, digits)}{SPACE}%"


def signed_percent(value: float) -> str:
    """Return a relative difference with its sign: 0.005 is +0.5 %."""
    rounded = round(100 * value, 1)
    return f"{'±' if rounded == 0 else '+' if rounded > 0 else '−'}{abs(rounded):.1f}{SPACE}%"


def fixed(decimals: int) -> Formatter:
    """Return a formatter that writes a fixed number of decimals."""

    def write(value: float) -> str:
        return _minus(f"{value:,.{decimals}f}") if math.isfinite(value) else plain(value)

    return write


def duration(seconds: float) -> str:
    """Return seconds in the two units that matter: 48 s, 2 min 5 s, 3 h 10 min, 2 d 4 h."""
    if not math.isfinite(seconds):
        return DASH
    if seconds < 60:
        return f"{plain(seconds, 2)}{SPACE}s"
    rounded = round(seconds)
    for size, unit, part, part_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if rounded >= size:
            rest = rounded % size // part
            return f"{rounded // size}{SPACE}{unit}" + (f" {rest}{SPACE}{part_unit}" if rest else "")
    return f"{rounded}{SPACE}s"


def linear_ticks(low: float, high: float, target: int = 5) -> list[float]:
    """Return about `target` round numbers (steps of 1, 2, 2.5 or 5) inside [low, high]."""
    span = high - low
    if not span > 0:
        return [low]
    raw = span / target
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


LOG_TICK_GAP = 0.15  # of the height, from which the ends of a logarithmic axis get a number more


def log_ticks(low: float, high: float) -> list[float]:
    """Return ticks for a logarithmic axis: 1-2-3-4-6-8 within a decade, powers of ten over many.

    No end of the axis is without a number nearby, as far as 1-2-5 times a power of ten can give it one.
    """
    ticks = _log_ticks(low, high)
    gap, rest = LOG_TICK_GAP * math.log10(high / low), _of_decades(low, high, (1, 2, 5))
    if rest and rest[-1] > ticks[-1] * 1.001 and math.log10(high / ticks[-1]) > gap:
        ticks = [*ticks, rest[-1]]
    if rest and rest[0] < ticks[0] * 0.999 and math.log10(ticks[0] / low) > gap:
        ticks = [rest[0], *ticks]
    return ticks


def _of_decades(low: float, high: float, factors: tuple[int, ...]) -> list[float]:
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [f * 10.0**e for e in exponents for f in factors if low <= f * 10.0**e <= high]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = math.log10(high / low)
    for factors in ((1, 2, 3, 4, 6, 8), (1, 2, 5), (1,)):
        ticks = _of_decades(low, high, factors)
        if len(ticks) <= 6:
            break
    if len(ticks) > 8:
        ticks = ticks[:: math.ceil(len(ticks) / 6)]
    return ticks if len(ticks) >= 4 or decades > 1 else linear_ticks(low, high, 4)


def tick_formatter(ticks: list[float]) -> Formatter:
    """Return one formatter for all ticks of an axis, so that neighbours show the same number of decimals."""
    largest = max((abs(tick) for tick in ticks), default=1.0)
    if largest >= 1000 or (0 < largest < 1e-3):
        return lambda value: compact(value, 4) if largest >= 1000 else _short_exponent(value)
    if len(ticks) > 1 and min(abs(tick) for tick in ticks) > 0 and largest / min(map(abs, ticks)) > 30:
        return lambda value: _trim(value, 2) if abs(value) >= 1e-3 else _short_exponent(value)
    gaps = [abs(b - a) for a, b in pairwise(ticks)] or [largest or 1.0]
    decimals = next((d for d in range(6) if all(_is_round(value, d) for value in ticks + gaps)), 6)
    return fixed(decimals)


def _is_round(value: float, decimals: int) -> bool:
    scaled = value * 10.0**decimals
    return abs(scaled - round(scaled)) < 1e-6 * max(1.0, abs(scaled))


def exponent(value: float) -> str:
    """Return a large number for an axis: 1.2e18."""
    return _short_exponent(value) if abs(value) >= 1e4 else _trim(value, 3)


def _short_exponent(value: float) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{_minus(mantissa.rstrip('0').rstrip('.'))}e{_minus(str(int(exponent)))}"


def _trim(value: float, digits: int) -> str:
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return _minus(text.rstrip("0").rstrip(".") if "." in text else text)


def _minus(text: str) -> str:
    return text.replace("-", "−")
