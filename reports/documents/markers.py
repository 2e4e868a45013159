"""Markers in Markdown between which text is generated, and the filling of them.

    <!-- table: NAME KIND option=value ... -->
    what `tables.TABLES[KIND]` gives for reports/published/NAME/results.json
    <!-- end -->

    ... decodes <!-- figure: NAME CELL PATH -->1.49x (1.45x to 1.53x)<!-- end --> as fast ...

Options have no spaces; lists are separated by commas.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from compose.errors import UserError, suggest
from compose.results.io import load_results
from compose.results.schema import Results
from reports.documents.figures import figure
from reports.documents.provenance import provenance
from reports.documents.tables import TABLES

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = Path("reports/published")
DOCUMENTS = (Path("README.md"), Path("docs/performance.md"), Path("docs/gates.md"))
"""Documents whose every number comes from a results file."""

MARKED = re.compile(r"(<!-- (table|figure): (.*?) -->)(.*?)(<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Marker:
    """What is to be generated between a marker and its end."""

    kind: str
    """`table` or `figure`."""
    run: str
    """A folder of reports/published."""
    words: tuple[str, ...]
    """A table's name; or a figure's cell and path."""
    options: dict[str, str]

    @classmethod
    def read(cls, kind: str, text: str) -> Marker:
        """Read what stands behind the colon.

        Raises:
            UserError: words are missing.
        """
        parts = text.split()
        options = dict(part.split("=", 1) for part in parts if "=" in part)
        run, *words = [part for part in parts if "=" not in part] or [""]
        expected = {"table": 1, "figure": 2}[kind]
        if len(words) != expected:
            form = "table: RUN KIND" if kind == "table" else "figure: RUN CELL PATH"
            raise UserError(f"the marker {kind}: {text!r} is not of the form {form}")
        return cls(kind, run, tuple(words), options)


def fill(text: str, document: Path, root: Path = ROOT) -> str:
    """The document's text with everything between markers made anew.

    Raises:
        UserError: a marker names a run, a table, a cell or a number that there is not.
    """
    return MARKED.sub(lambda match: _filled(match, document, root), text)


def unfinished(text: str) -> list[str]:
    """Markers without an end, which `fill` does not see."""
    begun = re.findall(r"<!-- (?:table|figure): .*?-->", text)
    whole = [match[1] for match in MARKED.finditer(text)]
    return begun[len(whole) :] if len(begun) != len(whole) else []


def outside(text: str) -> str:
    """The text without what is generated."""
    return MARKED.sub("", text)


def markers(text: str) -> Iterator[Marker]:
    """Every marker of a document."""
    for match in MARKED.finditer(text):
        yield Marker.read(match[2], match[3])


def _filled(match: re.Match[str], document: Path, root: Path) -> str:
    begin, kind, words, _, end = match.groups()
    marker = Marker.read(kind, words)
    results = _results(root / PUBLISHED / marker.run)
    if kind == "figure":
        cell, path = marker.words
        return f"{begin}{figure(results, cell, path, **marker.options)}{end}"
    (name,) = marker.words
    if name not in TABLES:
        raise UserError(f"there is no table {name!r}: {suggest(name, TABLES)}")
    lines = _called(TABLES[name], results, marker.options)
    up = "../" * (len(document.parts) - 1)
    link = f"{up}{PUBLISHED.as_posix()}/{marker.run}/results.json"
    return "\n".join([begin, "", *lines, "", provenance(results, link), "", end])


def _called(
    table: Callable[..., list[str]], results: Results, options: dict[str, str]
) -> list[str]:
    try:
        return table(results, **options)
    except TypeError as error:
        raise UserError(f"a table's options: {error}") from error


@cache
def _results(folder: Path) -> Results:
    return load_results(folder)
