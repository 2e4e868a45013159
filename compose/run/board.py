"""What a run needs of a display: a board with one line a job. `terminal.progress` has one."""

from __future__ import annotations

from typing import Protocol

from compose.processes.messages import Message


class Line(Protocol):
    """The line of one job. Safe to call from any thread."""

    def update(
        self, done: int, total: int, phase: str = "", /, *, detail: str = "", **numbers: float
    ) -> None:
        """The job has finished `done` of `total` parts, or bytes; as `Progress` in `units`."""

    def done(self, note: str = "") -> None:
        """The job ended well."""

    def failed(self, note: str) -> None:
        """The job failed."""


class Board(Protocol):
    """The lines of a run."""

    def line(self, name: str, *, step: str | None = None, cell: str | None = None) -> Line:
        """A line for a new job, and which step or cell it is about."""

    def print(self, text: str) -> None:
        """Print a line that stays."""


def show_progress(line: Line, message: Message) -> None:
    """Show a worker's progress message on a line."""
    done, total, phase, *more = message["progress"]
    line.update(done, total, phase, **(more[0] if more else {}))
