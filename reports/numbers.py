"""Numbers as a report writes them: three digits, thin spaces between thousands and before units."""

from __future__ import annotations

from compose.results.parts import Divergence

DASH = "–"
THIN = "\u202f"
TIMES = "×"


def number(value: float) -> str:
    """Three digits that count, thousands set apart: 0.034, 1.62, 23.4, 412, 12 400."""
    size = abs(value)
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


def divergence(place: Divergence) -> str:
    """Where speculation left plain decoding, in words."""
    parts = [
        None if place.prompt is None else f"prompt {place.prompt}",
        None if place.position is None else f"token {place.position}",
        None if place.margin is None else f"margin {place.margin:.2g}",
        None if place.margin_share is None else f"{place.margin_share:.1e} of the range",
    ]
    return ", ".join(part for part in parts if part) or "place not recorded"
