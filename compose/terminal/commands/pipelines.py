"""The commands on a pipeline file: `new`, `validate`, `plan`, `run`, `search`."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from compose.terminal.commands.options import (
    AsEvents,
    AsJson,
    AtMostKl,
    AtMostMb,
    AtMostPerplexityRatio,
    ExecutorName,
    MinRetained,
    Out,
    PipelineFile,
    Quiet,
    Workers,
    words,
)

if TYPE_CHECKING:
    from compose.run.state import Settings


def new(
    file: Annotated[Path, typer.Argument(help="The pipeline file to write.", metavar="FILE")],
    model: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="The model to compress: a Hugging Face hub id, a folder, a GGUF file, or a short"
            " name such as smollm2-135m-instruct.",
        ),
    ],
) -> None:
    """Write a pipeline file for a model, with an explanation of each line."""
    from compose.planning.new_file import write_new_file

    write_new_file(file, model)
    word = shlex.quote(str(file))
    typer.echo(f"{file} is written. Next:\n  gateskip plan {word}\n  gateskip run {word}")


def validate(file: PipelineFile) -> None:
    """Check a pipeline file, and show the first mistake with its line."""
    from compose.assets import default_cache
    from compose.planning.prepare import load_plan
    from compose.terminal.show import default_matrix_text, plan_counts

    planned = load_plan(file, default_cache())
    typer.echo(f"{file}: valid: {plan_counts(planned)}")
    if text := default_matrix_text(planned.pipeline):
        typer.echo(text)


def plan(
    file: PipelineFile,
    out: Out = Path("runs"),
    as_json: AsJson = False,
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate",
            help="Estimate time, memory and disk space from earlier runs on this machine.",
        ),
    ] = False,
) -> None:
    """List the models that a run of a pipeline file would make, and the variants (combinations of
    stages) that the run would measure."""
    from compose.assets import default_cache
    from compose.outputs.run_folder import RunFolder
    from compose.planning.prepare import load_plan, model_shape
    from compose.run.preflight import look
    from compose.terminal.show import plan_state, plan_tables, readiness_state, readiness_text

    planned = load_plan(file, default_cache())
    folder = RunFolder.of(planned, out)
    ready = look(planned, folder, settings_of_run(out, again=False), list(planned.cells))
    if estimate:
        from compose.run.estimate import estimate as estimate_of
        from compose.terminal.estimate import estimate_tables

        estimates = estimate_of(planned, folder, model_shape(planned.pipeline, default_cache()))
        if as_json:
            typer.echo(json.dumps(estimates.to_json(), indent=1))
        else:
            Console().print(estimate_tables(estimates))
    elif as_json:
        state = plan_state(planned, folder) | readiness_state(ready)
        typer.echo(json.dumps(state, indent=1))
    else:
        Console().print(plan_tables(planned, folder))
    if not as_json and (text := readiness_text(ready)):
        typer.echo(text)


def run(
    file: PipelineFile,
    out: Out = Path("runs"),
    executor: ExecutorName = "local",
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CELL",
            help="Measure only the variant of this name, and the variants that it is compared"
            " with.",
        ),
    ] = None,
    again: Annotated[
        bool,
        typer.Option(
            "--again", help="Measure all variants again, without making their models again."
        ),
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            help="Retry stages and measurements that crashed, hung or exceeded a limit in an"
            " earlier run.",
        ),
    ] = False,
    workers: Workers = None,
    quiet: Quiet = False,
    json_lines: AsEvents = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write training curves for TensorBoard.")
    ] = False,
    mirror: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="A shared store of models: download models that another run has made, and upload"
            " new models.",
        ),
    ] = None,
) -> None:
    """Make and measure all variants of a pipeline file; a variant is one combination of
    stages."""
    from compose.assets import default_cache
    from compose.mirror import Mirror
    from compose.planning.prepare import load_plan
    from compose.processes.executors import make_executor
    from compose.terminal.live.run_shown import run_shown

    planned = load_plan(file, default_cache())
    settings = settings_of_run(
        out, tuple(only or ()), again=again, tensorboard=tensorboard, retry_failed=retry_failed
    )
    if mirror is not None:
        settings = replace(settings, mirror=Mirror.at(mirror))
    where = make_executor(executor, planned.pipeline.benchmark.threads, workers)
    result = run_shown(planned, settings, where, quiet=quiet, json_lines=json_lines)
    raise typer.Exit(result.exit_code)


def search(
    file: PipelineFile,
    at_most_kl: AtMostKl = None,
    at_most_mb: AtMostMb = None,
    at_most_perplexity_ratio: AtMostPerplexityRatio = None,
    min_retained: MinRetained = None,
    maximize: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            help="Metric to maximize: decode (decode speed) or prefill (prefill speed).",
            autocompletion=words("decode", "prefill"),
        ),
    ] = None,
    minimize: Annotated[
        str | None,
        typer.Option(
            metavar="METRIC",
            help="Metric to minimize: size (on disk), kl (KL divergence from the baseline) or"
            " perplexity.",
            autocompletion=words("size", "kl", "perplexity"),
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            metavar="MINUTES",
            min=0,
            help="Time in minutes after which the search tries no new sequence of stages.",
        ),
    ] = None,
    out: Out = Path("runs"),
    executor: ExecutorName = "local",
    workers: Workers = None,
    quiet: Quiet = False,
    json_lines: AsEvents = False,
) -> None:
    """Find the sequence of stages that is best in one metric, within given limits on size and
    quality (docs/search.md)."""
    from compose.language.parse import load_pipeline
    from compose.processes.executors import make_executor
    from compose.search.target import make_target
    from compose.terminal.search import require_found, search_shown

    target = make_target(
        maximize=maximize,
        minimize=minimize,
        at_most_kl=at_most_kl,
        at_most_perplexity_ratio=at_most_perplexity_ratio,
        at_most_mb=at_most_mb,
        min_retained=min_retained,
    )
    benchmark = load_pipeline(file).benchmark
    result = search_shown(
        file,
        target,
        settings_of_run(out, again=False),
        make_executor(executor, benchmark.threads, workers),
        minutes=minutes,
        quiet=quiet,
        json_lines=json_lines,
        echo=typer.echo,
    )
    require_found(result)


def settings_of_run(
    out: Path,
    only: tuple[str, ...] = (),
    *,
    again: bool,
    tensorboard: bool = False,
    retry_failed: bool = False,
) -> Settings:
    """Settings of a run under this command line."""
    from compose.assets import default_cache
    from compose.run.state import Settings
    from compose.terminal.reports import draw_report
    from compose.units import public_path

    command = shlex.join(["gateskip", *map(public_path, sys.argv[1:])])
    return Settings(
        out,
        default_cache(),
        command,
        only,
        again,
        tensorboard,
        retry_failed=retry_failed,
        draw=draw_report,
    )
