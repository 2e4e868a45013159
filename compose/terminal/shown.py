"""What comes from elsewhere, made fit for a console: no control sequence, no markup."""

from __future__ import annotations

from rich.markup import escape

from compose.units import printable


def shown(text: str) -> str:
    """A name, reason, token or line of a log as rich's markup that shows just it."""
    return escape(printable(text))
