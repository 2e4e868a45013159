"""A report as Markdown: what is printed is escaped, once, where it enters the page."""

from __future__ import annotations

import re
from typing import Any

from compose.units import printable
from reports.load import Row
from reports.tables import columns, numbers
from reports.tables.run_tables import Lines
from reports.tables.speculation import Histogram


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


def markdown_table(table: columns.Table) -> Raw:
    """A pipe table: number and name of the cell, then the columns."""
    heads = ["#", "cell", *(escape_markdown(column.label) for column in table.columns)]
    sides = [":---" if column.words else "---:" for column in table.columns]
    lines = [_pipes(heads), _pipes(["---:", ":---", *sides])]
    for row, entries in table.rows:
        lines.append(_pipes([*_identity(row), *map(_entry, entries)]))
    return Raw("\n".join(lines))


def markdown_lines(table: Lines) -> Raw:
    """A pipe table of lines of text."""
    lines = [_pipes([escape_markdown(head) for head in table.heads])]
    lines.append(_pipes([":---"] * len(table.heads)))
    lines += [_pipes([escape_markdown(text) for text in row]) for row in table.rows]
    return Raw("\n".join(lines))


def bars(histogram: Histogram) -> Raw:
    """A histogram in text: `length: rounds`."""
    return Raw(" · ".join(f"{n}:{numbers.THIN}{count}" for n, count, _ in histogram.bars))


def _identity(row: Row) -> list[str]:
    name = escape_markdown(row.cell.name)
    return [str(row.number), f"**{name}**" if row.is_baseline else name]


def _entry(entry: columns.Entry) -> str:
    return escape_markdown(f"{entry.text} ({entry.note})" if entry.note else entry.text)


def _pipes(parts: list[str]) -> str:
    return f"| {' | '.join(parts)} |"
