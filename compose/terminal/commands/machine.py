"""The commands on the program itself: `stages`, `schema`, `doctor`."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console


def _stage_names() -> list[str]:
    """What shell completion offers."""
    from compose.stages.registry import STAGES

    return list(STAGES)


def stages(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="STAGE",
            help="The name of the stage to explain, such as int4.",
            autocompletion=_stage_names,
        ),
    ] = None,
    rules: Annotated[
        bool,
        typer.Option(
            "--rules", help="Print a table that shows which stages may follow which other stages."
        ),
    ] = False,
) -> None:
    """List all stages that a pipeline file can use, or explain the settings of one stage."""
    from compose.planning.composition import as_markdown
    from compose.terminal.stages import stage_list, stage_text

    if rules:
        typer.echo(as_markdown())
    else:
        typer.echo(stage_list() if name is None else stage_text(name))


def schema() -> None:
    """Print the JSON Schema with which editors can check pipeline files."""
    from compose.language.parse import to_json_schema

    typer.echo(json.dumps(to_json_schema(), indent=2))


def doctor() -> None:
    """List the tools and libraries that this machine has or lacks, and say how to install missing
    ones."""
    from compose.terminal.doctor import examine
    from compose.terminal.show import print_findings

    findings = examine()
    print_findings(Console(), findings)
    raise typer.Exit(any(finding.status == "missing" for finding in findings))
