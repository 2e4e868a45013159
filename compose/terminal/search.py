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
    budget_minutes: float | None,
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
    budget_s = None if budget_minutes is None else 60 * budget_minutes
    shown_board = Board(console, quiet=quiet, events=events).shown()
    with reported(events), orderly_stop(), shown_board as board:
        found = search(file, target, settings, executor, board, budget_s=budget_s)
    print_found(console, found)
    if events is None:
        echo(json.dumps(found.to_json()))
    else:
        outcome = result_event(found.run) | {
            "exit_code": 0 if found.winner else UserError.exit_code
        }
        events.emit("result", **outcome, search=found.to_json())
    return found


def print_found(console: Console, found: SearchResult) -> None:
    """The finalists in a table, why others were dropped, and where the pipeline file is."""
    title = (
        f"Found by {found.probed} probes of {len(found.space.candidates)} chains: {found.target}"
    )
    names = [name for name in COLUMNS if any(_known(found, name, cell) for cell in _cells(found))]
    lines = [
        (_sign(found, cell), cell.name, *(_shown(found, name, cell) for name in names))
        for cell in _cells(found)
    ]
    console.print(rich_table(text_table(("", "chain", *names), lines), title))
    console.print("* winner   + on the front, which no chain surpasses", highlight=False)
    if found.winner is not None and not found.winner.chain:
        console.print("No chain meets the bounds, only the baseline itself does.", highlight=False)
    for chain, why in list(found.fates.items())[:FATES_SHOWN]:
        line = f"  {cell_name(chain)}: {why}"
        console.print(shown(line), highlight=False, soft_wrap=True)
    if len(found.fates) > FATES_SHOWN:
        console.print(f"  and {len(found.fates) - FATES_SHOWN} others", highlight=False)
    console.print(f"gateskip run {shown(str(found.file))}", highlight=False, soft_wrap=True)
    report = found.run.folder.root / "report.html"
    console.print(f"  {shown(str(report))}", highlight=False, soft_wrap=True)


def _cells(found: SearchResult) -> list[CellResult]:
    """The measured finalists: the winner, the front, then the others."""
    first = [*([] if found.winner is None else [found.winner]), *found.front]
    cells = [*first, *found.last.measured]
    return list({cell.name: cell for cell in cells}.values())


def _sign(found: SearchResult, cell: CellResult) -> str:
    if found.winner is not None and cell.name == found.winner.name:
        return "*"
    return "+" if cell.name in {each.name for each in found.front} else ""


def _known(found: SearchResult, metric: str, cell: CellResult) -> bool:
    return number(found.last, metric, cell) is not None


def _shown(found: SearchResult, metric: str, cell: CellResult) -> str:
    """A number, with its interval where the target bounds it."""
    text = metric_text(metric, number(found.last, metric, cell))
    bounded = any(bound.metric == metric for bound in found.target.bounds)
    ends = interval(found.last, metric, cell)
    if not bounded or ends is None or ends[0] == ends[1]:
        return text
    return f"{text} ({metric_text(metric, ends[0])} to {metric_text(metric, ends[1])})"


def require_found(found: SearchResult) -> None:
    """Raise why there is no winner, where there is none."""
    if found.why_none is not None:
        raise found.why_none
