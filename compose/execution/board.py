"""What a run needs of a display: a board with one line a job. `terminal.progress` has one."""

from __future__ import annotations

from typing import Protocol


class Line(Protocol):
    """The line of one job. Safe to call from any thread."""

    def update(self, done: int, total: int, note: str = "") -> None:
        """The job has finished `done` of `total` parts, or bytes."""

    def done(self, note: str = "") -> None:
        """The job ended well."""

    def failed(self, note: str) -> None:
        """The job failed."""


class Board(Protocol):
    """The lines of a run."""

    def line(self, name: str) -> Line:
        """A line for a new job."""

    def print(self, text: str) -> None:
        """Print a line that stays."""
