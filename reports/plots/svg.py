"""A drawn SVG made fit to stand inside the page: themed by CSS variables, small, its marks named.

matplotlib writes one colour scheme. Inside the page every colour of the light theme becomes a
variable (`--p-ink`, `--p-s0`, ...), so one drawing serves light and dark.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape

from compose.units import printable
from reports.plots.theme import FONTS, LIGHT, Theme

MARK = "mark-"
"""A group of this id and a row's number is that row's mark."""


def whole(text: str) -> str:
    """The SVG as a file of its own: light, with the reader's fonts."""
    return _own_fonts(text).replace("<svg ", f'<svg style="background: {LIGHT.ground}" ', 1)


def _own_fonts(text: str) -> str:
    """The reader's fonts in place of the one that the picture was laid out with."""
    return text.replace("'DejaVu Sans'", FONTS).replace("DejaVu Sans", FONTS)


def inline(text: str, prefix: str, marks: Mapping[int, tuple[str, str]]) -> str:
    """The `<svg>` element for a page. `prefix` makes its ids unique there.

    `marks` is row number -> (cell's name, what its mark says when it is pointed at).
    """
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->|<style .*?</style>", "", text, flags=re.S)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) xmlns:xlink="[^"]*"', r"\1", text, count=1).replace("xlink:", "")
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'href="#', f'href="#{prefix}', text).replace("url(#", f"url(#{prefix}")
    text = _themed(_own_fonts(text), LIGHT)
    text = re.sub(r"\n\s*", " ", re.sub(r">\s+<", "><", text))
    text = text.replace("stroke: #000000; stroke-opacity: 0", "stroke: none")
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d\d)\d+", r"\1", tag[0]), text)
    return re.sub(rf'<g id="{prefix}{MARK}(\d+)">', lambda m: _mark(int(m[1]), marks), text)


def _mark(number: int, marks: Mapping[int, tuple[str, str]]) -> str:
    name, says = (printable(text) for text in marks[number])
    return f'<g class="mark" data-cell="{escape(name)}"><title>{escape(says)}</title>'


def _themed(text: str, theme: Theme) -> str:
    """Every colour of the theme as a variable; a colour that it does not know stays."""
    names = theme.variables()

    def replace(match: re.Match[str]) -> str:
        name = names.get(match[0].lower())
        return match[0] if name is None else f"var(--p-{name})"

    return re.sub(r"#[0-9a-fA-F]{6}\b(?=[;\"])", replace, text)
