"""Numbers as people write and read them: sizes, durations, progress, metrics."""

from __future__ import annotations

import re

from compose.errors import UserError

BYTES_FROM = 1_000_000
"""No job has so many parts: from here on, they are bytes."""


UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2**10, "mi": 2**20, "gi": 2**30}
BYTES = ("size", "resident", "peak")
SHARES = ("saved", "saved-gross", "retained", "accuracy", "agreement", "acceptance")
"""Names in `METRICS` whose values are bytes, and those whose values are 0 to 1."""


def parse_bytes(text: str) -> float:
    """A size such as 90MB, 1.5 GiB or 120000000, in bytes.

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmg]?i?)b?\s*", text.lower())
    if match is None or match[2] not in UNITS:
        raise UserError(f"{text!r} is no size", fix="write it as 120000000, 90MB or 1.5GiB")
    return float(match[1]) * UNITS[match[2]]


def count(done: int, total: int) -> str:
    """How far a job is: nothing for a job of one part, megabytes for what counts bytes."""
    if total >= BYTES_FROM:
        return f"{done / 1e6:.0f}/{total / 1e6:.0f} MB"
    return f"{done}/{total}" if total > 1 else ""


def span(seconds: float) -> str:
    """A duration for people: 0.4 s, 12 s, 3 min 05 s, 2 h 10 min.

    >>> span(185)
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
    """A size for people, in decimal units.

    >>> bytes_text(269_060_552)
    '269.1 MB'
    """
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def metric_text(name: str, value: float | None) -> str:
    """The value of a metric for people; a dash when there is none.

    >>> metric_text("agreement", 0.954)
    '95.4 %'
    """
    if value is None:
        return "–"
    if name in BYTES:
        return bytes_text(value)
    return f"{100 * value:.1f} %" if name in SHARES else f"{value:,.4g}"
