"""Numbers as text: what reports, documents and the terminal write is made here.

A `Style` is a set of digits and signs. `PAGE` is a report's: ×1.62, 1.22–1.30, 12 400 with thin
spaces. `PLAIN` is that of documents and the terminal: 1.62x (1.22 to 1.30), 12437.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import ByteSize

DASH = "–"
THIN = "\u202f"
TIMES = "×"
NO_DIFFERENCE = "no difference"

BYTES = ("size", "resident", "peak")
SHARES = (
    *("saved", "saved-gross", "retained", "written", "ranked"),
    *("accuracy", "agreement", "acceptance"),
)
"""Names in `METRICS` whose values are bytes, and those whose values are 0 to 1."""

Ends = Sequence[float]
"""The two ends of an interval, or of quartiles."""


def three_digits(value: float) -> str:
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
    return three_places(value)


def three_places(value: float) -> str:
    """Three digits, but at most three places, and whole numbers whole: 0.104, 1.09, 16.8, 1320.

    >>> [three_places(v) for v in (0.1041, 1.0899, 16.83, 374.9, 1319.6)]
    ['0.104', '1.09', '16.8', '375', '1320']
    """
    size = abs(value)
    return f"{value:.{3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0}f}"


def two_places(value: float) -> str:
    """A factor to two places, a far one like any number: 1.62, 12.4."""
    return f"{value:.2f}" if value < 10 else three_digits(value)


def unless_one(text: str, ends: Ends | None) -> str:
    """The text of a ratio, or "no difference" where its interval includes 1."""
    return NO_DIFFERENCE if ends is not None and ends[0] <= 1 <= ends[1] else text


def four_digits(value: float) -> str:
    """Four digits, without zeros at the end: 12.35, 0.5, 1,320."""
    return f"{value:,.4g}"


@dataclass(frozen=True)
class Style:
    """How a place writes numbers. An absent number is a dash."""

    number: Callable[[float], str]
    """A number: its digits."""
    near_one: Callable[[float], str]
    """The digits of a factor, and of its interval's ends."""
    gap: str
    """Between a number and its unit."""
    thousands: str
    """Between thousands."""
    to: str
    """Between the ends of an interval."""
    factor: str
    """A factor, as a pattern."""

    def whole(self, value: float) -> str:
        """A whole number, or a number rounded to one, thousands set apart."""
        return f"{value:,.0f}".replace(",", self.thousands)

    def share(self, value: float) -> str:
        """A share in percent with one place, without the sign."""
        return f"{100 * value:.1f}"

    def percent(self, value: float | None, ends: Ends | None = None) -> str:
        """A share in percent with its sign and its interval."""
        if value is None:
            return DASH
        return f"{self.share(value)}{self.gap}%{self.within(ends, 100.0)}"

    def megabytes(self, value: float) -> str:
        """Bytes in units of 10^6, without the unit: from 100 on whole."""
        return self.number(value / 1e6) if value < 1e8 else self.whole(value / 1e6)

    def span(self, low: float, high: float, show: Callable[[float], str] | None = None) -> str:
        """The two ends of an interval or of quartiles: 1.22–1.30, or 1.22 to 1.30."""
        show = show or self.number
        return f"{show(low)}{self.to}{show(high)}"

    def within(self, ends: Ends | None, scale: float = 1.0) -> str:
        """The ends in brackets, after a space; nothing where there are none.

        >>> PLAIN.within((1.0712, 1.109))
        ' (1.07 to 1.11)'
        """
        return "" if ends is None else f" ({self.span(scale * ends[0], scale * ends[1])})"

    def with_ends(self, value: float | None, ends: Ends | None, scale: float = 1.0) -> str:
        """A number with its interval."""
        return DASH if value is None else f"{self.number(scale * value)}{self.within(ends, scale)}"

    def times(self, value: float) -> str:
        """A factor: ×1.62, or 1.62x."""
        return self.factor.format(self.near_one(value))

    def ratio(self, value: float, ends: Ends | None, *, differs: bool | None = None) -> str:
        """A factor with its interval; in words where it is no different from 1: by `differs`, or
        where that is not given, by the interval."""
        if ends is None:
            return self.times(value)
        text = self.times(value) if differs else NO_DIFFERENCE
        if differs is None:
            text = unless_one(self.times(value), ends)
        return f"{text} ({self.span(ends[0], ends[1], self.near_one)})"


PAGE = Style(three_digits, two_places, gap=THIN, thousands=THIN, to=DASH, factor=TIMES + "{}")
PLAIN = Style(three_places, three_places, gap=" ", thousands="", to=" to ", factor="{}x")


def three_decimals(value: float) -> str:
    """A ratio near 1 to three places, a far one like any number."""
    return f"{value:.3f}" if value < 10 else three_digits(value)


def milliseconds(seconds: float) -> str:
    """Seconds in milliseconds, without the unit."""
    return three_digits(seconds * 1000)


def duration_text(seconds: float) -> str:
    """A duration as text: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min.

    >>> duration_text(185)
    '3 min 05 s'
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def bytes_text(size: float) -> str:
    """A size as text, in decimal units.

    >>> bytes_text(269_060_552)
    '269.1 MB'
    """
    return ByteSize(round(size)).human_readable(decimal=True, separator=" ")


def metric_text(name: str, value: float | None) -> str:
    """The value of a metric as text, with four digits; a dash where there is none.

    >>> metric_text("agreement", 0.954)
    '95.4 %'
    """
    if value is None:
        return DASH
    if name in BYTES:
        return bytes_text(value)
    return PLAIN.percent(value) if name in SHARES else four_digits(value)
