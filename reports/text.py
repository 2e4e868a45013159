"""Text from results as a page may print it."""

from __future__ import annotations

import re
from datetime import datetime
from typing import Any
from urllib.parse import quote

from markupsafe import Markup, escape


def plain(text: str) -> str:
    """Text without colour codes and other control characters; lines and tabs stay."""
    uncoloured = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f]", "", uncoloured)


def plain_unless_markup(value: Any) -> Any:
    """What the environment of the HTML templates does to every value before it escapes it."""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def breakable(name: str) -> Markup:
    """A cell's name, escaped, that may break after each plus."""
    return Markup("+<wbr>").join(escape(part) for part in plain(name).split("+"))


def anchor(name: str) -> str:
    """A cell's name in the page's address: report.html#cell=NAME."""
    return quote(plain(name), safe="+:.-_")


def day(date: Any) -> str | None:
    """`24 November 2026` of an ISO date; what is no date stays as it is."""
    if not isinstance(date, str):
        return None
    try:
        moment = datetime.fromisoformat(date)
    except ValueError:
        return date
    return f"{moment.day} {moment:%B %Y}"
