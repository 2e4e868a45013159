"""A table in the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table as RichTable

from compose.table import Entry, Table, Tone
from compose.terminal.shown import shown

STYLES: dict[Tone, str] = {
    "good": "green",
    "fair": "yellow",
    "poor": "red",
    "unknown": "dim",
    "same": "dim",
}


def rich_table(table: Table[Any], title: str | None = None) -> RichTable:
    """The table as rich draws it; texts and notes are shown as they are, whatever they hold."""
    drawn = RichTable(
        title=title and shown(title),
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
    )
    for column in table.columns:
        drawn.add_column(
            shown(column.label),
            overflow="fold",
            header_style="dim",
            justify="right" if column.align == "right" else "left",
        )
    for _, entries in table.rows:
        drawn.add_row(*map(_text, entries))
    return drawn


def _text(entry: Entry) -> str:
    text = shown(f"{entry.text} ({entry.note})" if entry.note else entry.text)
    return text if entry.tone is None else f"[{STYLES[entry.tone]}]{text}[/]"
