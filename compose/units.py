"""Sizes, durations, progress and metrics as text, and sizes read from text."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import ByteSize, TypeAdapter, ValidationError

from compose.errors import UserError
from gateskip.model.progress import Progress as Progress

BYTES_FROM = 1_000_000
"""From this total on, `progress_text` takes the parts of a job for bytes."""

BYTES = ("size", "resident", "peak")
SHARES = ("saved", "saved-gross", "retained", "accuracy", "agreement", "acceptance")
"""Names in `METRICS` whose values are bytes, and those whose values are 0 to 1."""

_SIZE = re.compile(r"\s*\d*\.?\d+\s*([kmgt]i?)?b?\s*", re.IGNORECASE)  # ByteSize takes 1.2.3MB
_CODES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Text that a terminal or a page shows as it is: without control sequences and characters.

    Lines and tabs stay. Characters that turn the direction of writing are removed, and halves of
    surrogate pairs. Names, reasons, tokens and logs are not ours and may hold any of these.

    >>> printable("a\\x1b[31mb\\x1b]0;title\\x07c\\r\\u202e")
    'abc'
    """
    return _CONTROL.sub("", _CODES.sub("", text))


def public_path(text: str) -> str:
    """A source or a word of a command as results show it: only the last part of an absolute path,
    so that results do not name folders of a machine."""
    return Path(text).name if Path(text).is_absolute() else text


def parse_bytes(text: str) -> int:
    """A size such as 90MB, 1.5 GiB or 120000000, in bytes.

    Raises:
        UserError: the text is not a size.
    """
    try:
        if _SIZE.fullmatch(text):
            return TypeAdapter(ByteSize).validate_python(text)
    except ValidationError:
        pass
    raise UserError(f"{text!r} is not a size", fix="write it as 120000000, 90MB or 1.5GiB")


def progress_text(done: int, total: int) -> str:
    """How far a job is: nothing for a job of one part, sizes where the parts are bytes.

    >>> progress_text(3, 9)
    '3/9'
    """
    if total >= BYTES_FROM:
        return f"{bytes_text(done)} of {bytes_text(total)}"
    return f"{done}/{total}" if total > 1 else ""


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
    """The value of a metric as text; a dash where there is none.

    >>> metric_text("agreement", 0.954)
    '95.4 %'
    """
    if value is None:
        return "–"
    if name in BYTES:
        return bytes_text(value)
    return f"{100 * value:.1f} %" if name in SHARES else f"{value:,.4g}"
