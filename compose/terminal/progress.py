"""The board of a run: one line a job, live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from compose.units import duration_text, progress_text

PLAIN_EVERY_S = 20.0
"""How often a job's progress is printed where there is no terminal."""


class Line:
    """The line of one job. Safe to call from any thread."""

    def __init__(self, board: Board, name: str) -> None:
        self._board = board
        self.name = name
        self._started = time.monotonic()
        self._last_printed = self._started
        self._task: TaskID | None = board.open(name)

    def update(self, done: int, total: int, note: str = "") -> None:
        """The job has finished `done` of `total` parts, or bytes."""
        if self._task is not None:
            self._board.move(self._task, done, total, note)
        elif time.monotonic() - self._last_printed >= PLAIN_EVERY_S:
            self._last_printed = time.monotonic()
            self._board.print(f"  {self.name}: {progress_text(done, total)} {note}".rstrip())

    def done(self, note: str = "") -> None:
        """The job ended well."""
        self._close("[green]✓[/]", note)

    def failed(self, note: str) -> None:
        """The job failed."""
        self._close("[red]✗[/]", note)

    def _close(self, sign: str, note: str) -> None:
        if self._task is not None:
            self._board.close(self._task)
        seconds = time.monotonic() - self._started
        noted = f" [dim]{escape(note)}[/]" if note else ""
        text = f"{sign} {escape(self.name)} [dim]{duration_text(seconds)}[/]{noted}"
        self._board.print(text, markup=True)


class Board:
    """All lines of a run, on one console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live: Progress | None = None
        self._lock = threading.Lock()

    @contextmanager
    def shown(self) -> Iterator[Board]:
        """Show live lines while the block runs, if the console is a terminal."""
        if not self.console.is_terminal:
            yield self
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}", style="dim"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self.console, transient=True) as live:
            self._live = live
            try:
                yield self
            finally:
                self._live = None

    def line(self, name: str) -> Line:
        """A line for a new job."""
        return Line(self, name)

    def print(self, text: str, *, markup: bool = False) -> None:
        """Print a line that stays."""
        with self._lock:
            self.console.print(text, markup=markup, highlight=False, soft_wrap=True)

    def open(self, name: str) -> TaskID | None:
        """A live line, or None when there is no terminal."""
        if self._live is None:
            return None
        return self._live.add_task(escape(name), total=None, note="")

    def move(self, task: TaskID, done: int, total: int, note: str) -> None:
        """Move a live line."""
        if self._live is not None:
            known = total if total > 1 else None  # the progress of a job of one part is not known
            text = f"{progress_text(done, total)} {escape(note)}"
            self._live.update(task, completed=done, total=known, note=text.strip())

    def close(self, task: TaskID) -> None:
        """Take a live line away."""
        if self._live is not None:
            self._live.remove_task(task)
