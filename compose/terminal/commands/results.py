"""The commands on a run's results: `report`, `pick`, `export`; and on a folder: its conversions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from compose.terminal.commands.options import AsJson, RunDir, no_model_name, words
from compose.terminal.commands.pick_options import PickOptions, with_pick_options

if TYPE_CHECKING:
    from compose.results.schema import Results

GgufType = Annotated[
    str | None,
    typer.Option(
        "--type",
        metavar="TYPE",
        help="GGUF type of weights that are not quantized yet: f32, f16 (the default), bf16,"
        " q8_0, q4_1 or q4_0. Weights that are already quantized are copied unchanged.",
        autocompletion=words("f32", "f16", "bf16", "q8_0", "q4_1", "q4_0"),
    ),
]


def report(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN_DIR",
            help="The folder of a run. If several folders are given, all other runs are compared"
            " with the first run.",
        ),
    ],
    fail_on_regression: Annotated[
        bool,
        typer.Option(
            "--fail-on-regression",
            help="Exit with code 1 if a result of a later run is"
            " significantly worse than in the first run.",
        ),
    ] = False,
) -> None:
    """Write the report of a finished run again, or compare runs."""
    from compose.terminal.reports import compare_and_tell, draw

    for run_dir in run_dirs:
        typer.echo(draw(run_dir))
    worse = compare_and_tell(run_dirs, fail_on_regression=fail_on_regression, tell=typer.echo)
    raise typer.Exit(worse and fail_on_regression)


@with_pick_options
def pick(run_dir: RunDir, *, options: PickOptions, as_json: AsJson = False) -> None:
    """Show the best variant of a run within given limits, such as a maximum size."""
    from compose.terminal.show import cell_json, cell_text

    results = _results_of(run_dir)
    cell = options.pick(results)
    if as_json:
        typer.echo(json.dumps(cell_json(results, cell), indent=1))
    else:
        Console().print(cell_text(results, cell))


@with_pick_options
def export(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="The folder of a run (runs/NAME), or a model folder.",
            callback=no_model_name,
        ),
    ],
    to: Annotated[
        Path,
        typer.Option(
            metavar="PATH", help="The folder to write, or the file to write with --format gguf."
        ),
    ],
    *,
    output_format: Annotated[
        str,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="Output format: hf (transformers), gguf (llama.cpp) or compressed-tensors (vLLM).",
            autocompletion=words("hf", "gguf", "compressed-tensors"),
        ),
    ] = "hf",
    kind: GgufType = None,
    cell: Annotated[
        str | None,
        typer.Option(
            metavar="CELL",
            help="The variant to export; by default, the best variant within the given limits.",
        ),
    ] = None,
    options: PickOptions,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Check the exported folder: decode 32 tokens, and compare them with the tokens"
            " of the source model; works only with --format hf.",
        ),
    ] = False,
) -> None:
    """Export a variant of a run, or a model folder, for transformers, llama.cpp or vLLM."""
    from compose.terminal.export import (
        convert,
        export_cell_as,
        is_model,
        place_of,
        require_convertible,
        require_format,
    )

    require_format(output_format, kind, verify=verify)
    if is_model(source):
        picks = cell is not None or options != PickOptions()
        require_convertible(source, output_format, picks=picks)
        place = place_of(to, output_format, source.absolute().name)
        typer.echo(convert(source, place, output_format, kind))
        return
    name = cell or options.pick(_results_of(source)).name
    typer.echo(export_cell_as(source, name, to, output_format, kind, verify=verify))


def gguf(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model folder without gates.")],
    to: Annotated[Path, typer.Option(metavar="FILE.gguf", help="The file to write.")],
    kind: GgufType = None,
) -> None:
    """Old name of `gateskip export FOLDER --format gguf`."""
    from compose.terminal.export import convert

    typer.echo(convert(folder, to, "gguf", kind))


def compressed_tensors(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER", help="A model folder quantized by int4, int8, gptq or autoround."
        ),
    ],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to write.")],
) -> None:
    """Old name of `gateskip export FOLDER --format compressed-tensors`."""
    from compose.terminal.export import convert

    typer.echo(convert(folder, to, "compressed-tensors", None))


def _results_of(run_dir: Path) -> Results:
    from compose.results.io import load_results
    from compose.terminal.reports import folder_of_results

    return load_results(folder_of_results(run_dir))
