"""Progress as text, sizes read from text, and text that is safe to show."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import ByteSize, TypeAdapter, ValidationError

from compose.errors import UserError
from compose.numbers import bytes_text
from gateskip.model.progress import Progress as Progress

BYTES_FROM = 1_000_000
"""From this total on, `progress_text` takes the parts of a job for bytes."""

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
