"""`gateskip search` in the terminal: progress, the table of what was found, and one JSON line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from compose.errors import UserError
from compose.numbers import metric_text
from compose.planning.planner import cell_name
from compose.processes.executors import Executor
from compose.results.schema import CellResult
from compose.run.state import Settings
from compose.search.probes import interval, number
from compose.search.search import SearchResult, search
from compose.search.target import Target
from compose.table import text_table
from compose.terminal.live.events import JsonLines, reported, result_event
from compose.terminal.live.progress import Board
from compose.terminal.live.stopping import orderly_stop
from compose.terminal.shown import shown
from compose.terminal.table import rich_table

COLUMNS = ("decode", "prefill", "size", "kl", "perplexity-ratio", "retained")
"""Metrics of the table, those of the target among them."""

FATES_SHOWN = 12
"""Chains that were dropped, at most, with the reason of each; the JSON line counts all."""


def search_shown(
    file: Path,
    target: Target,
    settings: Settings,
    executor: Executor,
    *,
    minutes: float | None,
    quiet: bool,
    json_lines: bool,
    echo: Callable[[str], None],
) -> SearchResult:
    """Search, show how it goes on and what was found, and end with one line of JSON.

    With `json_lines` text is on stderr, and events are on stdout.

    Raises:
        UserError: the file cannot be used, or no chain meets the target; then the message names
            the nearest, after the table of what was found.
    """
    console = Console(stderr=json_lines)
    events = JsonLines(sys.stdout) if json_lines else None
    budget_s = None if minutes is None else 60 * minutes
    shown_board = Board(console, quiet=quiet, events=events).shown()
    with reported(events), orderly_stop(), shown_board as board:
        result = search(file, target, settings, executor, board, budget_s=budget_s)
    print_found(console, result)
    if events is None:
        echo(json.dumps(result.to_json()))
    else:
        outcome = result_event(result.run) | {
            "exit_code": 0 if result.winner else UserError.exit_code
        }
        events.emit("result", **outcome, search=result.to_json())
    return result


def print_found(console: Console, result: SearchResult) -> None:
    """The finalists in a table, why others were dropped, and where the pipeline file is."""
    title = (
        f"Measured {result.probed} of {len(result.space.candidates)} sequences of stages:"
        f" {result.target}"
    )
    names = [name for name in COLUMNS if any(_known(result, name, cell) for cell in _cells(result))]
    lines = [
        (_sign(result, cell), cell.name, *(_shown(result, name, cell) for name in names))
        for cell in _cells(result)
    ]
    console.print(rich_table(text_table(("", "stages", *names), lines), title))
    console.print(
        "* winner   + no other line is better in all limited and optimized metrics", highlight=False
    )
    if result.winner is not None and not result.winner.chain:
        console.print("Only the baseline itself keeps to the limits.", highlight=False)
    for chain, why in list(result.fates.items())[:FATES_SHOWN]:
        line = f"  {cell_name(chain)}: {why}"
        console.print(shown(line), highlight=False, soft_wrap=True)
    if len(result.fates) > FATES_SHOWN:
        console.print(f"  and {len(result.fates) - FATES_SHOWN} other chains", highlight=False)
    console.print(f"gateskip run {shown(str(result.file))}", highlight=False, soft_wrap=True)
    report = result.run.folder.root / "report.html"
    console.print(f"  {shown(str(report))}", highlight=False, soft_wrap=True)


def _cells(result: SearchResult) -> list[CellResult]:
    """The measured finalists: the winner, the front, then the others."""
    first = [*([] if result.winner is None else [result.winner]), *result.front]
    cells = [*first, *result.last.measured]
    return list({cell.name: cell for cell in cells}.values())


def _sign(result: SearchResult, cell: CellResult) -> str:
    if result.winner is not None and cell.name == result.winner.name:
        return "*"
    return "+" if cell.name in {candidate.name for candidate in result.front} else ""


def _known(result: SearchResult, metric: str, cell: CellResult) -> bool:
    return number(result.last, metric, cell) is not None


def _shown(result: SearchResult, metric: str, cell: CellResult) -> str:
    """A number, with its interval where the target bounds it."""
    text = metric_text(metric, number(result.last, metric, cell))
    bounded = any(bound.metric == metric for bound in result.target.bounds)
    ends = interval(result.last, metric, cell)
    if not bounded or ends is None or ends[0] == ends[1]:
        return text
    return f"{text} ({metric_text(metric, ends[0])} to {metric_text(metric, ends[1])})"


def require_found(result: SearchResult) -> None:
    """Raise the search's error where it has no winner."""
    if result.why_none is not None:
        raise result.why_none
