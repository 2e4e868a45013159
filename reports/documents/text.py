"""Numbers of documents as text; an absent number is a dash."""

from __future__ import annotations

from collections.abc import Sequence

from compose.results.parts import Estimate, Measured

DASH = "–"


def digits(value: float) -> str:
    """Three digits that count: 0.104, 1.09, 16.8, 375, 1320.

    >>> [digits(v) for v in (0.1041, 1.0899, 16.83, 374.9, 1319.6)]
    ['0.104', '1.09', '16.8', '375', '1320']
    """
    size = abs(value)
    return f"{value:.{3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0}f}"


def spread(ends: Sequence[float] | None, scale: float = 1.0) -> str:
    """An interval, or quartiles, in brackets; nothing where there is none.

    >>> spread((1.0712, 1.109))
    ' (1.07 to 1.11)'
    """
    if ends is None:
        return ""
    low, high = (digits(scale * end) for end in ends)
    return f" ({low} to {high})"


def with_ends(value: float | None, ends: Sequence[float] | None, scale: float = 1.0) -> str:
    """A number with its interval."""
    return DASH if value is None else f"{digits(scale * value)}{spread(ends, scale)}"


def measured(value: Measured | None) -> str:
    """A median with its quartiles."""
    return DASH if value is None else with_ends(value.median, value.quartiles)


def factor(value: Estimate | None) -> str:
    """A ratio with its interval; in words where the interval holds 1."""
    if value is None:
        return DASH
    text = f"{digits(value.value)}x{spread(value.ci95)}"
    return text if value.different is not False else f"no difference{spread(value.ci95)}"


def megabytes(value: int | None) -> str:
    """Bytes in units of 10^6."""
    return DASH if value is None else f"{value / 1e6:.0f}"


def percent(value: float | None, ends: Sequence[float] | None = None) -> str:
    """A share as a percentage, with its interval."""
    return DASH if value is None else f"{100 * value:.1f} %{spread(ends, 100.0)}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, without columns that are empty in every row."""
    shown = [
        number
        for number, name in enumerate(head)
        if number == 0 or any(row[number] not in ("", DASH) for row in rows)
    ]
    lines = [[head[n] for n in shown], ["---"] * len(shown)]
    lines += [[row[n] for n in shown] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines]
