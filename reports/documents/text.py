"""What a table of a document holds: estimates and medians as text, and the lines of Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from compose.numbers import DASH, PLAIN
from compose.results.parts import Estimate, Measured
from compose.table import text_table
from reports.tables.markdown import Raw, markdown_table


def measured(value: Measured | None) -> str:
    """A median with its quartiles."""
    return DASH if value is None else PLAIN.with_ends(value.median, value.quartiles)


def factor(value: Estimate | None) -> str:
    """A ratio with its interval; in words where the interval includes 1."""
    if value is None:
        return DASH
    return PLAIN.ratio(value.value, value.ci95, differs=value.different is not False)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, without columns that are empty in every row."""
    texts = text_table(list(map(Raw, head)), [list(map(Raw, row)) for row in rows], "none")
    return markdown_table(texts.without_absent()).split("\n")
