"""The board of a run: one line a job, live on a terminal, else plain lines; events if asked."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from compose.contract import Job
from compose.numbers import PLAIN, duration_text
from compose.run.state import show_progress
from compose.terminal.live.events import JsonLines
from compose.terminal.live.timing import Smoothed, TimeLeft
from compose.terminal.shown import shown
from compose.units import printable, progress_text

PLAIN_EVERY_S = 20.0
"""How often a job's progress is printed where there is no terminal."""

SMOOTHED = ("loss", "tokens_per_s")
"""Numbers that are shown as averages of the last reports; one step of training says little."""


class Line:
    """The line of one job. Safe to call from any thread."""

    def __init__(self, board: Board, name: str, about: Mapping[str, str | None]) -> None:
        self._board, self.name, self._about = board, name, about
        self._started = self._last_printed = board.clock()
        self._task: TaskID | None = board.open(name)
        self._phase: tuple[str, int] | None = None
        self._begin()
        self._tell("begin")

    def update(
        self, done: int, total: int, phase: str = "", /, *, detail: str = "", **numbers: float
    ) -> None:
        """The job has finished `done` of `total` parts of a phase, or bytes."""
        if (phase, total) != self._phase:
            self._phase = (phase, total)
            self._begin()
        now = self._board.clock()
        left = self._left.update(done, total, now)
        for name in SMOOTHED:
            if name in numbers:
                numbers[name] = self._means[name].update(numbers[name])
        text = _text(done, total, phase, numbers, left, detail)
        if self._task is not None:
            self._board.move(self._task, done, total, text)
        elif now - self._last_printed >= self._board.plain_every_s:
            self._last_printed = now
            self._board.remark(f"  {self.name}: {text}")
        values = {name: numbers.get(name) for name in SMOOTHED}
        place = {"phase": phase, "done": done, "total": total, "detail": detail}
        self._tell("progress", **place, **values, eta_s=left)

    def done(self, note: str = "") -> None:
        """The job ended well."""
        self._board.remark(self._close("[green]✓[/]", note), markup=True)
        self._tell("done", note=note, seconds=self._seconds())

    def failed(self, note: str) -> None:
        """The job failed."""
        self._board.print(self._close("[red]✗[/]", note), markup=True)
        self._tell("failed", note=note, seconds=self._seconds())

    def _begin(self) -> None:
        """A phase begins: nothing is known of it yet."""
        self._left = TimeLeft()
        self._means = {name: Smoothed() for name in SMOOTHED}

    def _seconds(self) -> float:
        return self._board.clock() - self._started

    def _close(self, sign: str, note: str) -> str:
        if self._task is not None:
            self._board.close(self._task)
        noted = f" [dim]{shown(note)}[/]" if note else ""
        return f"{sign} {shown(self.name)} [dim]{duration_text(self._seconds())}[/]{noted}"

    def _tell(self, event: str, **fields: Any) -> None:
        if self._board.events is not None:
            self._board.events.emit(event, job=self.name, **self._about, **fields)


class Board:
    """All lines of a run, on one console; with `quiet` only what failed is shown."""

    def __init__(
        self,
        console: Console,
        *,
        quiet: bool = False,
        events: JsonLines | None = None,
        plain_every_s: float = PLAIN_EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console, self.quiet, self.events = console, quiet, events
        self.plain_every_s, self.clock = plain_every_s, clock
        self._live: Progress | None = None
        self._lock = threading.Lock()

    @contextmanager
    def shown(self) -> Iterator[Board]:
        """Show live lines while the block runs, if the console is a terminal that can."""
        if self.quiet or not takes_live_lines(self.console):
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

    def line(self, name: str, *, step: str | None = None, cell: str | None = None) -> Line:
        """A line for a new job, and which step or cell it is about."""
        return Line(self, name, {"step": step, "cell": cell})

    def print(self, text: str, *, markup: bool = False) -> None:
        """Print a line that stays."""
        with self._lock:
            self.console.print(
                text if markup else printable(text), markup=markup, highlight=False, soft_wrap=True
            )

    def remark(self, text: str, *, markup: bool = False) -> None:
        """Print a line that stays, unless only failures are wanted."""
        if not self.quiet:
            self.print(text, markup=markup)

    def open(self, name: str) -> TaskID | None:
        """A live line, or None when there is no terminal."""
        if self._live is None:
            return None
        return self._live.add_task(shown(name), total=None, note="")

    def move(self, task: TaskID, done: int, total: int, text: str) -> None:
        """Move a live line."""
        if self._live is not None:
            shown_total = total if total > 1 else None  # one part has no progress to show
            self._live.update(task, completed=done, total=shown_total, note=shown(text))

    def close(self, task: TaskID) -> None:
        """Take a live line away."""
        if self._live is not None:
            self._live.remove_task(task)


def takes_live_lines(console: Console) -> bool:
    """Whether a console can redraw lines: a real terminal that is not dumb, and no CI log.

    rich takes any stream for a terminal where FORCE_COLOR is set, so the stream itself is asked.
    """
    real = getattr(console.file, "isatty", lambda: False)()
    return bool(real and console.is_terminal and not console.is_dumb_terminal) and not _in_ci()


def _in_ci() -> bool:
    return os.environ.get("CI", "").lower() not in ("", "0", "false")


def _text(
    done: int,
    total: int,
    phase: str,
    numbers: Mapping[str, float],
    left: float | None,
    detail: str,
) -> str:
    """A report as text, its parts between dots."""
    parts = [f"{phase} {progress_text(done, total)}".strip(), detail]
    if "loss" in numbers:
        parts.append(f"loss {PLAIN.number(numbers['loss'])}")
    if "tokens_per_s" in numbers:
        parts.append(f"{PLAIN.number(numbers['tokens_per_s'])} tokens/s")
    if left is not None and done < total:
        parts.append(f"{duration_text(left)} left")
    return " · ".join(part for part in parts if part)


def ask_shown(job: Job, title: str, *, quiet: bool = False) -> Any:
    """As `processes.worker_process.ask_once`, with the worker's progress shown on stderr."""
    from compose.processes.worker_process import ask_once

    with Board(Console(stderr=True), quiet=quiet).shown() as board:
        line = board.line(title)
        try:
            result = ask_once(job, partial(show_progress, line))
        except BaseException:
            line.failed("")
            raise
        line.done()
        return result
