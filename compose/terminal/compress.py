"""`gateskip compress` as a terminal shows it: each job's place in the whole, and the card."""

from __future__ import annotations

import itertools

from rich.console import Console, Group
from rich.text import Text

from compose.outputs.run_folder import RunFolder, is_measured
from compose.planning.plan import Plan
from compose.recipes.card import Card, SideBySide, card_of
from compose.recipes.compress import Compressed, compress, plan_of
from compose.recipes.recipe import Request
from compose.run.preflight import look
from compose.run.state import Settings
from compose.terminal.live.progress import Board, Line
from compose.terminal.live.stopping import orderly_stop
from compose.terminal.table import rich_table
from compose.units import printable


def compress_shown(
    request: Request, settings: Settings, workers: int | None, *, quiet: bool
) -> Compressed:
    """Compress a model; show progress and a card on stdout unless `quiet`. Raises as `compress`."""
    console = Console()
    plan = plan_of(request, settings)
    jobs = _jobs(plan, settings, request)
    with orderly_stop(), Board(console, quiet=quiet).shown() as board:
        done = compress(request, plan, settings, Numbered(board, jobs), workers)
    if not quiet:
        print_card(console, card_of(done))
    return done


class Numbered:
    """A board whose lines begin with their place in the whole. Safe to call from any thread."""

    def __init__(self, board: Board, total: int) -> None:
        self._board, self._total = board, total
        self._places = itertools.count(1)

    def line(self, name: str, *, step: str | None = None, cell: str | None = None) -> Line:
        """A line for a new job: `step 2 of 9: int4`."""
        place = next(self._places)
        self._total = max(self._total, place)  # speed alone may be left to measure
        return self._board.line(f"step {place} of {self._total}: {name}", step=step, cell=cell)

    def print(self, text: str) -> None:
        """Print a line that stays."""
        self._board.print(text)


def _jobs(plan: Plan, settings: Settings, request: Request) -> int:
    """Lines that a run will open: what is fetched, made, scored, timed and written."""
    folder = RunFolder.of(plan, settings.out, settings.store)
    steps = sum(not folder.store.has(step.key) for step in plan.steps)
    cells = sum(not is_measured(folder, plan, cell) for cell in plan.cells)
    fetches = bool(look(plan, folder, settings, list(plan.cells)).fetched())
    return (
        fetches
        + steps
        + cells
        + (1 if cells else 0)
        + 1
        + request.gguf
        + request.compressed_tensors
    )


def print_card(console: Console, card: Card) -> None:
    """Print the card of a compressed model."""
    console.print(rich_table(card.numbers, printable(card.title)))
    console.print(Text(printable(card.sentence)))
    for pair in card.answers:
        console.print(_pair(pair))
    console.print("\nNext")
    width = max(len(purpose) for _, purpose in card.next)
    for command, purpose in card.next:
        line = f"  {purpose.ljust(width)}  {command}"
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def _pair(pair: SideBySide) -> Group:
    """A question with the answers before and after."""
    rows = (("\n? ", pair.question), ("before: ", pair.before), ("after:  ", pair.after))
    return Group(*(Text(f"{head}{printable(_one_line(text))}") for head, text in rows))


def _one_line(text: str) -> str:
    return " ".join(text.split())
