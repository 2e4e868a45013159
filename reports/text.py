"""Text from results as a page may print it."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from urllib.parse import quote

from markupsafe import Markup, escape

from compose.units import printable


def plain_unless_markup(value: Any) -> Any:
    """What the environment of the HTML templates does to every value before it escapes it."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def breakable(name: str) -> Markup:
    """A cell's name, escaped, that may break after each plus."""
    return Markup("+<wbr>").join(escape(part) for part in printable(name).split("+"))


def anchor(name: str) -> str:
    """A cell's name in the page's address: report.html#cell=NAME."""
    return quote(printable(name), safe="+:.-_")


def day(date: Any) -> str | None:
    """`24 November 2026` of an ISO date; another text stays as it is."""
    if not isinstance(date, str):
        return None
    try:
        moment = datetime.fromisoformat(date)
    except ValueError:
        return date
    return f"{moment.day} {moment:%B %Y}"
