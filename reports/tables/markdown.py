"""A report as Markdown: what is printed is escaped, once, where it enters the page."""

from __future__ import annotations

import re
from typing import Any

from compose.numbers import THIN
from compose.table import Align, Column, Entry, Table
from compose.units import printable
from reports.load import Row
from reports.tables.speculation import Histogram

SIDES: dict[Align, str] = {"left": ":---", "right": "---:", "none": "---"}


class Raw(str):
    """Markdown that is already escaped."""


def escape_markdown(text: str) -> str:
    """Text that Markdown and the HTML inside it leave as it is, on one line."""
    text = printable(text)
    flat = " ".join(text.split()) if "\n" in text or "\r" in text else text
    flat = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~$!])", r"\\\1", flat)


def escaped_unless_raw(value: Any) -> Any:
    """What the environment of the Markdown template does to every value that it prints."""
    return value if isinstance(value, Raw) else escape_markdown(str(value))


def fenced(text: str, language: str = "") -> Raw:
    """A code block whose fence is longer than any run of backticks in the text."""
    text = printable(text)
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return Raw(f"{fence}{language}\n{text.rstrip()}\n{fence}")


def cells_markdown(table: Table[Row]) -> Raw:
    """A table of cells: number and name of the cell, then the columns."""
    columns = (Column(Raw("#"), "", ""), Column("variant", "", "", align="left"), *table.columns)
    rows = tuple((row, (*_identity(row), *entries)) for row, entries in table.rows)
    return markdown_table(Table(columns, rows))


def markdown_table(table: Table[Any]) -> Raw:
    """A pipe table; a note follows its entry in brackets."""
    heads = [str(escaped_unless_raw(column.label)) for column in table.columns]
    lines = [_pipes(heads), _pipes([SIDES[column.align] for column in table.columns])]
    lines += [_pipes([_entry(entry) for entry in entries]) for _, entries in table.rows]
    return Raw("\n".join(lines))


def bars(histogram: Histogram) -> Raw:
    """A histogram in text: `length: rounds`."""
    return Raw(" · ".join(f"{n}:{THIN}{count}" for n, count, _ in histogram.bars))


def _identity(row: Row) -> tuple[Entry, Entry]:
    name = escape_markdown(row.cell.name)
    return Entry(str(row.number)), Entry(Raw(f"**{name}**" if row.is_baseline else name))


def _entry(entry: Entry) -> str:
    text = f"{entry.text} ({entry.note})" if entry.note else entry.text
    return str(escaped_unless_raw(text))


def _pipes(parts: list[str]) -> str:
    return f"| {' | '.join(parts)} |"
