"""Numbers as a report writes them: three digits, thin spaces between thousands and before units."""

from __future__ import annotations

from collections.abc import Callable

from compose.results.parts import Divergence, Estimate

DASH = "–"
THIN = "\u202f"
TIMES = "×"
NO_DIFFERENCE = "no difference"


def number(value: float) -> str:
    """Three digits that count, thousands set apart: 0.034, 1.62, 23.4, 412, 12 400.

    Small ones keep a digit that counts: 0.0004, 2e-05.
    """
    size = abs(value)
    if 0 < size < 0.0095:
        return f"{value:.4f}" if size >= 0.0001 else f"{value:.0e}"
    if size >= 1e7:
        return f"{value:.1e}"
    if size >= 1000:
        step = 10 ** (len(str(int(size))) - 3)
        return f"{round(value / step) * step:,.0f}".replace(",", THIN)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:.{digits}f}"


def count(value: int) -> str:
    """A whole number, thousands set apart."""
    return f"{value:,}".replace(",", THIN)


def ratio(value: float) -> str:
    """A ratio near 1 to three places, a far one like any number."""
    return f"{value:.3f}" if value < 10 else number(value)


def percent(value: float) -> str:
    """A share as a percentage with one place."""
    return f"{100 * value:.1f}{THIN}%"


def share(value: float) -> str:
    """A share in percent with one place, without the sign."""
    return f"{100 * value:.1f}"


def megabytes(value: float) -> str:
    """Bytes in units of 10^6, without the unit."""
    return number(value / 1e6) if value < 1e8 else f"{value / 1e6:,.0f}".replace(",", THIN)


def millis(value: float) -> str:
    """Seconds in milliseconds, without the unit."""
    return number(value * 1000)


def times(value: float) -> str:
    """A factor: ×1.62."""
    return f"{TIMES}{value:.2f}" if value < 10 else f"{TIMES}{number(value)}"


def span(low: float, high: float, show: Callable[[float], str]) -> str:
    """The two ends of an interval or of quartiles: 1.22–1.30."""
    return f"{show(low)}{DASH}{show(high)}"


def estimate(own: Estimate) -> str:
    """A ratio with its 95 % interval; one whose interval holds 1 is no difference."""
    return factor(own.value, (own.low, own.high))


def factor(value: float, ends: tuple[float, float] | None) -> str:
    """The same of a value and the ends of its interval, which may be unknown."""
    if ends is None:
        return times(value)
    within = span(*ends, _near_one)
    if ends[0] <= 1 <= ends[1]:
        return f"{NO_DIFFERENCE} ({within})"
    return f"{times(value)} ({within})"


def _near_one(value: float) -> str:
    return f"{value:.2f}" if value < 10 else number(value)


def divergence(place: Divergence) -> str:
    """Where speculation left plain decoding, in words."""
    parts = [
        None if place.prompt is None else f"prompt {place.prompt}",
        None if place.position is None else f"token {place.position}",
        None if place.margin is None else f"margin {place.margin:.2g}",
        None if place.margin_share is None else f"{place.margin_share:.1e} of the range",
    ]
    return ", ".join(part for part in parts if part) or "place not recorded"
