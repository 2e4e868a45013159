"""A run as a command shows it: progress, an optional table, how it ended, events if asked."""

from __future__ import annotations

import sys
from collections.abc import Callable

from rich.console import Console

from compose.planning.plan import Plan
from compose.processes.executors import Executor
from compose.results.schema import Results
from compose.run.runner import RunResult, run
from compose.run.state import Settings
from compose.terminal.live.events import JsonLines, last_line, reported, result_event
from compose.terminal.live.progress import Board
from compose.terminal.live.stopping import orderly_stop
from compose.terminal.show import print_result


def run_shown(
    plan: Plan,
    settings: Settings,
    executor: Executor,
    *,
    quiet: bool,
    json_lines: bool,
    table: Callable[[Console, Results], None] | None = None,
) -> RunResult:
    """Run a plan and show it on stdout; with `json_lines` text is on stderr, events on stdout.

    Where stdout is no terminal, the last line is an event also without `json_lines`.

    Raises as `run`.
    """
    console = Console(stderr=json_lines)
    stdout = JsonLines(sys.stdout)
    events = stdout if json_lines else None
    ends = stdout if json_lines or not sys.stdout.isatty() else None
    shown = Board(console, quiet=quiet, events=events).shown()
    with reported(ends), orderly_stop(), shown as board:
        result = run(plan, settings, executor, board)
    if table is not None:
        table(console, result.results)
    print_result(console, result)
    if ends is not None:
        ends.emit("result", **(result_event(result) if json_lines else last_line(result)))
    return result
