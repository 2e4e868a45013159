"""The command `gateskip`: its options, and all commands in the order in which help lists them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Annotated, Any

import typer

from compose.capacity import limit_threads
from compose.terminal.commands import machine, models, pipelines, results
from compose.terminal.commands.bench import bench
from compose.terminal.commands.cache import cache
from compose.terminal.commands.compress import compress
from compose.terminal.commands.group import Command, Commands
from compose.terminal.commands.serve import serve

FIRST: Mapping[str, Callable[..., Any]] = {
    "compress": compress,
    "run": pipelines.run,
    "new": pipelines.new,
    "pick": results.pick,
    "export": results.export,
    "chat": models.chat,
    "generate": models.generate,
    "serve": serve,
    "bench": bench,
    "report": results.report,
}
"""The commands that help lists first."""

ADVANCED: Mapping[str, Callable[..., Any]] = {
    "validate": pipelines.validate,
    "plan": pipelines.plan,
    "search": pipelines.search,
    "stages": machine.stages,
    "schema": machine.schema,
    "tune-draft": models.tune_draft,
    "insight": models.insight,
    "doctor": machine.doctor,
}
"""The commands that help lists below them."""

OLD: Mapping[str, Callable[..., Any]] = {
    "gguf": results.gguf,
    "compressed-tensors": results.compressed_tensors,
}
"""Old names of parts of `export`; help does not list them."""

app = typer.Typer(
    cls=Commands,
    name="gateskip",
    help="Make a language model smaller and faster, and measure how much quality it loses.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for name, command in FIRST.items():
    app.command(name, cls=Command)(command)
for name, command in ADVANCED.items():
    app.command(name, cls=Command, rich_help_panel="Advanced")(command)
for name, command in OLD.items():
    app.command(name, cls=Command, hidden=True)(command)
app.add_typer(cache, name="cache", rich_help_panel="Advanced")


def _print_version(requested: bool) -> None:
    if requested:
        try:
            version = metadata.version("gateskip-compose")
        except metadata.PackageNotFoundError:
            version = "from a source tree that is not installed"
        typer.echo(f"gateskip-compose {version}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the Python traceback of an error.")
    ] = False,
) -> None:
    """Take the options before the command."""


def main() -> None:
    """The entry point. Torch is imported by the commands that need it."""
    limit_threads()
    app()


if __name__ == "__main__":
    main()
