"""`gateskip cache`: the model folders that runs have stored: list, prune, verify."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from compose.numbers import bytes_text
from compose.outputs import stored
from compose.table import Entry, text_table
from compose.terminal.commands.group import Command, Group
from compose.terminal.commands.options import AsJson, Out
from compose.terminal.shown import shown
from compose.terminal.table import rich_table

cache = typer.Typer(
    cls=Group,
    help="List, check and remove the models that runs have stored.",
    no_args_is_help=True,
)


@cache.command("list", cls=Command)
def list_entries(out: Out = Path("runs"), as_json: AsJson = False) -> None:
    """List the stored models with their stages, their size and the runs that use them."""
    entries = stored.entries(out)
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in entries], indent=1))
        return
    lines = [
        (entry.key, _chain(entry), bytes_text(entry.size), entry.made, _runs(entry))
        for entry in entries
    ]
    console = Console()
    if entries:
        console.print(rich_table(text_table(("key", "stages", "size", "made", "runs"), lines)))
    total = sum(entry.size for entry in entries)
    where = shown(str(out / "store"))
    console.print(f"{len(entries)} steps, {bytes_text(total)} in {where}", highlight=False)


@cache.command(cls=Command)
def prune(
    out: Out = Path("runs"),
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Only list the model folders that would be removed, and remove nothing.",
        ),
    ] = False,
) -> None:
    """Remove stored models that no run uses, and unfinished models."""
    freed = 0
    for entry in stored.prunable(out):
        if not dry_run and not stored.remove(out, entry):
            typer.echo(f"{entry.key} is kept, because a run is using it")
            continue
        freed += entry.size
        typer.echo(f"{entry.key} {bytes_text(entry.size)}")
    done = "would be" if dry_run else "were"
    typer.echo(f"{bytes_text(freed)} {done} freed")


@cache.command(cls=Command)
def verify(out: Out = Path("runs")) -> None:
    """Compare every stored file with its recorded hash; the exit code is 1 if a file is damaged."""
    console, worst = Console(), 0
    for entry, damage in stored.damaged(out):
        if damage is not None:
            worst = 1
            line = f"[red]✗[/] {entry.key} {shown(damage)}; the next run will make it again"
        elif stored.hashed(out, entry):
            line = f"[green]✓[/] {entry.key} {shown(_chain(entry))}"
        else:
            why = "because an older version of gateskip made it"
            line = f"[yellow]![/] {entry.key} has no hashes, {why}"
        console.print(line, highlight=False, soft_wrap=True)
    raise typer.Exit(worst)


def _chain(entry: stored.Entry) -> str:
    return " > ".join(entry.chain) or "unfinished"


def _runs(entry: stored.Entry) -> Entry:
    """The runs that name it."""
    return Entry(", ".join(entry.runs)) if entry.runs else Entry("none", tone="fair")
