"""A table as a value: columns, and rows of entries. The terminal, reports and documents draw it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, Literal, TypeVar

from compose.numbers import DASH

Tone = Literal["good", "fair", "poor", "unknown", "same"]
Align = Literal["left", "right", "none"]
Subject = TypeVar("Subject")


@dataclass(frozen=True)
class Entry:
    """One place in a table: text, a smaller note, what it sorts by, its bar (0 to 1), its tone.

    A badge is drawn as a label in its tone's colour.
    """

    text: str = DASH
    note: str = ""
    sort: float | str | None = None
    bar: float | None = None
    tone: Tone | None = None
    badge: bool = False

    @property
    def is_absent(self) -> bool:
        """Whether there is nothing here, or nothing was measured."""
        return self.text in ("", DASH)


@dataclass(frozen=True)
class Column:
    """A column: its heading, its unit, its help. Numbers are set to the right."""

    head: str
    unit: str
    help: str
    align: Align = field(default="right", kw_only=True)

    @property
    def label(self) -> str:
        """Heading and unit in one line."""
        return f"{self.head} ({self.unit})" if self.unit else self.head

    @property
    def words(self) -> bool:
        """Whether it holds sentences, which may break."""
        return self.align == "left"


@dataclass(frozen=True)
class Table(Generic[Subject]):
    """Rows of entries under columns, each row with its subject.

    `absent` names the columns of which nothing was measured, and which are left out.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[Subject, tuple[Entry, ...]], ...]
    absent: tuple[str, ...] = ()

    def without_absent(self) -> Table[Subject]:
        """The same without columns in which every entry is absent."""
        places = range(len(self.columns))
        shown = [i for i in places if any(not row[i].is_absent for _, row in self.rows)]
        hidden = [self.columns[i].label for i in places if i not in shown] if self.rows else []
        return replace(
            self,
            columns=tuple(self.columns[i] for i in shown),
            rows=tuple((subject, tuple(row[i] for i in shown)) for subject, row in self.rows),
            absent=tuple(dict.fromkeys(hidden)),
        )


def text_table(
    heads: Sequence[str], lines: Iterable[Sequence[str | Entry]], align: Align = "left"
) -> Table[None]:
    """A table of texts, a line a row."""
    rows = ((None, tuple(map(_entry, line))) for line in lines)
    return Table(tuple(Column(head, "", "", align=align) for head in heads), tuple(rows))


def _entry(value: str | Entry) -> Entry:
    return value if isinstance(value, Entry) else Entry(value)
