"""A table as a value, and as the terminal draws it."""

from __future__ import annotations

import io

from rich.console import Console

from compose.table import Entry, text_table
from compose.terminal.table import rich_table


def test_columns_without_a_number_are_left_out_and_named() -> None:
    table = text_table(("cell", "speed", "size"), [("a", "–", "3"), ("b", "", Entry("4", "MB"))])
    short = table.without_absent()
    assert [column.label for column in short.columns] == ["cell", "size"]
    assert [[entry.text for entry in row] for _, row in short.rows] == [["a", "3"], ["b", "4"]]
    assert short.absent == ("speed",)


def test_the_terminal_shows_texts_and_notes_as_they_are() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    table = text_table(("[b]", "size"), [("[red]x", Entry("4", "of 5", tone="good"))])
    console.print(rich_table(table, "T[i]"))
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines == [["T[i]"], ["[b]", "size"], ["[red]x", "4", "(of", "5)"]]
