"""The command `gateskip`: each command reads arguments, calls one function and shows the result."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from compose.terminal.cache import cache
from compose.terminal.live.commands import Commands
from compose.terminal.meant import refuse_model
from compose.terminal.pick_options import PickOptions, with_pick_options

if TYPE_CHECKING:
    from compose.results.schema import Results
    from compose.run.state import Settings


app = typer.Typer(
    cls=Commands,
    name="gateskip",
    help="Compress a language model in every combination that a file names, and measure them all.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(cache, name="cache")


def _no_model(ctx: typer.Context, file: Path) -> Path:
    """The pipeline file. UserError, with what to do, where a model is named instead."""
    refuse_model(str(file), f"`gateskip {ctx.info_name}` takes a pipeline file")
    return file


PipelineFile = Annotated[
    Path, typer.Argument(help="The pipeline file (YAML).", metavar="FILE", callback=_no_model)
]
RunDir = Annotated[Path, typer.Argument(help="A run's folder: runs/NAME.", metavar="RUN_DIR")]
Out = Annotated[Path, typer.Option(help="Where runs and model folders are kept.")]
ExecutorName = Annotated[str, typer.Option(help="Where work runs: local or ray.")]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Steps and cells side by side; 1 gives each all cores.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show only what failed, and the end.")]
AsEvents = Annotated[
    bool,
    typer.Option(
        "--json-lines",
        help="Print events as JSON, one a line (docs/progress.md); text goes to stderr.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
KeepBlocks = Annotated[
    bool,
    typer.Option("--keep-blocks", help="Run a GGUF file's Q4_0, Q4_1 and Q8_0 blocks as they are."),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Most tokens of the answer.")]
Budget = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Share of branches computed.")]
Speculate = Annotated[
    bool | None, typer.Option(help="Draft and verify, or do not; else as the folder states.")
]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 is greedy decoding.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from the k most likely; 0 is all.")]
TopP = Annotated[float, typer.Option(min=0.01, max=1.0, help="Sample from this probability mass.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the sampling.")]


def console(*, err: bool = False) -> Console:
    """A console on the stream as it is now."""
    return Console(stderr=err)


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
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where in the code an error arose.")
    ] = False,
) -> None:
    """Take the options before the command."""


@app.command()
def new(
    file: Annotated[Path, typer.Argument(help="The file to write.", metavar="FILE")],
    model: Annotated[
        str, typer.Option(help="An alias, a hub id, a folder or a GGUF file.", metavar="MODEL")
    ],
) -> None:
    """Write a pipeline file to start from, with each line explained."""
    from compose.planning.new_file import write_new_file

    write_new_file(file, model)
    word = shlex.quote(str(file))
    typer.echo(f"{file} is written. Next:\n  gateskip plan {word}\n  gateskip run {word}")


@app.command()
def validate(file: PipelineFile) -> None:
    """Check a pipeline file; print the first mistake with its line."""
    from compose.assets import default_cache
    from compose.planning.prepare import load_plan
    from compose.terminal.show import default_matrix_text, plan_counts

    planned = load_plan(file, default_cache())
    typer.echo(f"{file}: valid: {plan_counts(planned)}")
    if text := default_matrix_text(planned.pipeline):
        typer.echo(text)


@app.command()
def plan(
    file: PipelineFile,
    out: Out = Path("runs"),
    as_json: AsJson = False,
    estimate: Annotated[
        bool,
        typer.Option("--estimate", help="Time, memory and disk, from what was measured here."),
    ] = False,
) -> None:
    """Show steps and cells, what is cached, and what is left out by which rule."""
    from compose.assets import default_cache
    from compose.outputs.run_folder import RunFolder
    from compose.planning.prepare import load_plan, model_shape
    from compose.run.preflight import look
    from compose.terminal.show import plan_state, plan_tables, readiness_state, readiness_text

    planned = load_plan(file, default_cache())
    folder = RunFolder.of(planned, out)
    ready = look(planned, folder, _settings(out, again=False), list(planned.cells))
    if estimate:
        from compose.run.estimate import estimate as estimate_of
        from compose.terminal.estimate import estimate_tables

        estimates = estimate_of(planned, folder, model_shape(planned.pipeline, default_cache()))
        if as_json:
            typer.echo(json.dumps(estimates.to_json(), indent=1))
        else:
            console().print(estimate_tables(estimates))
    elif as_json:
        state = plan_state(planned, folder) | readiness_state(ready)
        typer.echo(json.dumps(state, indent=1))
    else:
        console().print(plan_tables(planned, folder))
    if not as_json and (text := readiness_text(ready)):
        typer.echo(text)


@app.command()
def run(
    file: PipelineFile,
    out: Out = Path("runs"),
    executor: ExecutorName = "local",
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="CELL", help="Measure this cell and what it is compared with."),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Measure every cell again; model folders stay.")
    ] = False,
    retry_failed: Annotated[
        bool,
        typer.Option("--retry-failed", help="Try again what crashed, hung or hit a limit before."),
    ] = False,
    workers: Workers = None,
    quiet: Quiet = False,
    json_lines: AsEvents = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write training as TensorBoard files.")
    ] = False,
    mirror: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Fetch finished steps from there, and send them."),
    ] = None,
) -> None:
    """Make and measure every cell; what was finished before is kept."""
    from compose.assets import default_cache
    from compose.mirror import Mirror
    from compose.planning.prepare import load_plan
    from compose.processes.executors import make_executor
    from compose.terminal.live.run_shown import run_shown

    planned = load_plan(file, default_cache())
    settings = _settings(
        out, tuple(only or ()), again=again, tensorboard=tensorboard, retry_failed=retry_failed
    )
    if mirror is not None:
        settings = replace(settings, mirror=Mirror.at(mirror))
    where = make_executor(executor, planned.pipeline.benchmark.threads, workers)
    result = run_shown(planned, settings, where, quiet=quiet, json_lines=json_lines)
    raise typer.Exit(result.exit_code)


@app.command()
def search(
    file: PipelineFile,
    at_most_kl: Annotated[
        float | None, typer.Option(help="A bound: KL to the baseline, nats a token.")
    ] = None,
    at_most_perplexity_ratio: Annotated[
        float | None, typer.Option(help="A bound: perplexity over the baseline's.")
    ] = None,
    at_most_mb: Annotated[
        float | None, typer.Option(help="A bound: megabytes of weight files.")
    ] = None,
    min_retained: Annotated[
        float | None, typer.Option(help="A bound: share of the baseline's quality, 0 to 1.")
    ] = None,
    maximize: Annotated[str | None, typer.Option(help="The aim: decode or prefill.")] = None,
    minimize: Annotated[
        str | None, typer.Option(help="The aim: size_mb, kl or perplexity.")
    ] = None,
    budget_minutes: Annotated[
        float | None, typer.Option(min=0, help="When to stop proposing, and finish.")
    ] = None,
    out: Out = Path("runs"),
    executor: ExecutorName = "local",
    workers: Workers = None,
    quiet: Quiet = False,
    json_lines: AsEvents = False,
) -> None:
    """Find the chain that meets bounds and is best in one number (docs/search.md)."""
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
        _settings(out, again=False),
        make_executor(executor, benchmark.threads, workers),
        budget_minutes=budget_minutes,
        quiet=quiet,
        json_lines=json_lines,
        echo=typer.echo,
    )
    require_found(result)


def _settings(
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


@app.command()
def report(
    run_dirs: Annotated[
        list[Path],
        typer.Argument(help="A run's folder; of several, others are compared with the first."),
    ],
    fail_on_regression: Annotated[
        bool,
        typer.Option(
            "--fail-on-regression", help="Exit with 1 where a number became worse beyond chance."
        ),
    ] = False,
) -> None:
    """Draw each run's report anew from results.json; compare several runs."""
    from compose.terminal.reports import compare_and_tell, draw

    for run_dir in run_dirs:
        typer.echo(draw(run_dir))
    worse = compare_and_tell(run_dirs, fail_on_regression=fail_on_regression, tell=typer.echo)
    raise typer.Exit(worse and fail_on_regression)


def _results_of(run_dir: Path) -> Results:
    from compose.results.io import load_results
    from compose.terminal.reports import folder_of_results

    return load_results(folder_of_results(run_dir))


@app.command()
@with_pick_options
def pick(run_dir: RunDir, *, options: PickOptions, as_json: AsJson = False) -> None:
    """Find the best cell under constraints."""
    from compose.terminal.show import cell_json, cell_text

    results = _results_of(run_dir)
    cell = options.pick(results)
    if as_json:
        typer.echo(json.dumps(cell_json(results, cell), indent=1))
    else:
        console().print(cell_text(results, cell))


@app.command()
@with_pick_options
def export(
    run_dir: RunDir,
    to: Annotated[Path, typer.Option(help="The folder to fill.")],
    *,
    options: PickOptions,
    cell: Annotated[str | None, typer.Option(help="The cell; without it, one is picked.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Also compare 32 tokens with those of the source.")
    ] = False,
) -> None:
    """Export a cell as a checkpoint with its lineage, numbers and model card."""
    from compose.outputs.export import export_cell
    from compose.outputs.run_folder import RunFolder
    from compose.processes.executors import make_executor

    name = cell or options.pick(_results_of(run_dir)).name
    folder, executor = RunFolder.existing(run_dir), make_executor("local", None)
    with folder.locked():
        export_cell(folder, name, to, executor, compare_tokens=verify)
    same = ": the same logits and tokens as its source" if verify else ""
    typer.echo(f"{name} exported to {to}{same}")


@app.command()
def gguf(
    folder: Annotated[
        Path, typer.Argument(help="A model folder without gates: floats, or what int4, int8 made.")
    ],
    to: Annotated[Path, typer.Option(help="The file to write.", metavar="FILE.gguf")],
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="f32, f16, bf16, q8_0, q4_1 or q4_0; by default f16, and integers as they are.",
        ),
    ] = None,
) -> None:
    """Write a model folder as a GGUF file for llama.cpp; it is loaded back before it stays."""
    from compose.contract import GgufJob
    from compose.numbers import bytes_text, metric_text
    from compose.processes.worker_process import ask_once

    written = ask_once(GgufJob(folder.absolute(), to.absolute(), kind))
    size, kl = bytes_text(written["bytes"]), metric_text("kl", written["kl"])
    said = f"{to}: {size}, {written['kind']}, loads back"
    typer.echo(f"{said}; KL of its predictions to the folder's: {kl}")


@app.command("compressed-tensors")
def compressed_tensors(
    folder: Annotated[
        Path, typer.Argument(help="A model folder packed by int4, int8, gptq or autoround.")
    ],
    to: Annotated[Path, typer.Option(help="The folder to make.")],
) -> None:
    """Write a packed model folder for vLLM, as W4A16 or W8A16; codes and scales stay the same."""
    from compose.contract import CompressedTensorsJob
    from compose.processes.worker_process import ask_once
    from compose.terminal.show import compressed_text

    job = CompressedTensorsJob(folder.absolute(), to.absolute())
    typer.echo(compressed_text(to, ask_once(job)))


@app.command()
def chat(
    folder: Annotated[Path, typer.Argument(help="A model folder, or a GGUF file.")],
    max_new_tokens: MaxNewTokens = 1024,
    budget: Budget = None,
    speculate: Speculate = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    keep_blocks: KeepBlocks = False,
) -> None:
    """Chat with a model folder."""
    from compose.assets import default_cache
    from compose.contract import ChatJob
    from compose.processes.source_folder import as_folders
    from compose.terminal.chat import chat as chat_with

    (folder,) = as_folders([folder], default_cache(), keep_blocks=keep_blocks)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    chat_with(ChatJob(folder, max_new_tokens, budget, speculate, sampling, seed))


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="A model folder, or a GGUF file.")],
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    max_new_tokens: MaxNewTokens = 128,
    budget: Budget = None,
    speculate: Speculate = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends the answer.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="Print speed and counts.")] = False,
    keep_blocks: KeepBlocks = False,
) -> None:
    """Ask a model folder."""
    from compose.assets import default_cache
    from compose.contract import AnswerJob
    from compose.processes.source_folder import as_folders
    from compose.processes.worker_process import ask_once
    from compose.terminal.chat import show_text
    from compose.terminal.show import stats_text

    (folder,) = as_folders([folder], default_cache(), keep_blocks=keep_blocks)
    streams = sys.stdout.isatty()
    answer = ask_once(
        AnswerJob(
            folder=folder,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            budget=budget,
            speculate=speculate,
            sampling={"temperature": temperature, "top_k": top_k, "top_p": top_p},
            seed=seed,
            stop=tuple(stop or ()),
        ),
        show_text if streams else None,
    )
    typer.echo("" if streams else answer["text"])
    if stats:
        typer.echo(stats_text(answer), err=True)


@app.command()
def insight(
    folder: Annotated[Path, typer.Argument(help="A model folder with gates.")],
    text: Annotated[str, typer.Option(help="The text to look at; @FILE reads it from a file.")],
    budget: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of compute kept; 0.8 by default.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Also write the colours as a page.")] = None,
    as_json: AsJson = False,
) -> None:
    """Colour a text's tokens by how much compute each of them gets."""
    from compose.contract import InsightJob
    from compose.processes.worker_process import ask_once
    from compose.store import require_writable, write_text
    from compose.terminal.show import print_insight, read_text
    from reports.insight import to_html

    if html is not None:
        require_writable(html)
    shares = ask_once(InsightJob(folder, read_text(text), budget))
    if html is not None:
        write_text(html, to_html(shares, folder.name))
    if as_json:
        typer.echo(json.dumps(shares))
    else:
        print_insight(console(), shares)


@app.command()
def bench(
    folders: Annotated[list[Path], typer.Argument(help="Model folders, or GGUF files.")],
    systems: Annotated[
        list[str] | None,
        typer.Option(
            "--system",
            help="plain, skip:BUDGET, draft:BUDGET with +auto, +int4, +int3, +int2, +nf4,"
            " +int4-head, +learned, +lookup, +LENGTH, +verifyBUDGET; skip and draft with"
            " +promptBUDGET (prompts read at a budget of their own); one of these with +int8-kv"
            " (keys and values in 8 bits) or after a backend, as in gathered:plain."
            " All is compared with the first folder and system. plain alone by default.",
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="A peer on the first folder: llama.cpp:q4_k_m, openvino:int4, onnxruntime:int4,"
            " transformers, transformers:compiled, ..."
        ),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Rows; 1 by default.")] = None,
    context: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Prompt tokens, 128 by default; further ones with one row."),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="Prompts to use, by category: an alias or a file.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts of each category in a round, other ones in each."),
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded in one turn.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, interleaved.")] = 5,
    min_seconds: Annotated[
        float, typer.Option(min=0, help="How long each decodes in a round, in turns.")
    ] = 2.0,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Tokens are drawn; 0 is greedy decoding.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Sample from this probability mass.")
    ] = 1.0,
    one_process: Annotated[
        bool, typer.Option(help="Folders in turns in one process: no process is the luckier one.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; all cores if unset.")] = None,
    quality: Annotated[
        bool, typer.Option(help="Score perplexity, KL and tasks, peers included.")
    ] = False,
    text: Annotated[
        list[str] | None, typer.Option(help="Text of the perplexity: the first that can be had.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of that text.")] = 8192,
    task: Annotated[list[str] | None, typer.Option(help="A task to score.")] = None,
    questions: Annotated[int, typer.Option(min=1, help="Questions of each task.")] = 500,
    name: Annotated[
        str | None, typer.Option(help="Name of the run; bench-FOLDER by default.")
    ] = None,
    keep_blocks: KeepBlocks = False,
    out: Out = Path("runs"),
    quiet: Quiet = False,
    json_lines: AsEvents = False,
) -> None:
    """Measure folders, ways of decoding and other engines side by side, each in its own process
    unless they are told to share one."""
    from compose.assets import default_cache
    from compose.planning.bench_plan import bench_plan, default_name
    from compose.processes.executors import make_executor
    from compose.processes.source_folder import as_folders
    from compose.terminal.bench import benchmark_of, print_bench
    from compose.terminal.live.run_shown import run_shown

    benchmark = benchmark_of(
        batches=batch or [1],
        contexts=context or [128],
        prompts=prompts,
        limit=limit,
        new_tokens=new_tokens,
        repeats=repeats,
        min_seconds=min_seconds,
        one_process=one_process,
        sampling={"temperature": temperature, "top_p": top_p} if temperature else None,
        threads=threads,
        quality=quality,
        texts=text or [],
        tokens=tokens,
        tasks=task or [],
        questions=questions,
    )
    folders = as_folders(folders, default_cache(), keep_blocks=keep_blocks)
    title = name or default_name(folders[0])
    planned = bench_plan(title, folders, systems or [], against or [], benchmark)
    result = run_shown(
        planned,
        _settings(out, again=True),
        make_executor("local", threads),
        quiet=quiet,
        json_lines=json_lines,
        table=print_bench,
    )
    raise typer.Exit(result.exit_code)


@app.command("tune-draft")
def tune_draft(
    folder: Annotated[Path, typer.Argument(help="A model folder, such as an export.")],
    prompts: Annotated[
        str, typer.Option(help="Prompts like yours: an alias, or a file of JSON lines.")
    ] = "prompts",
    limit: Annotated[int | None, typer.Option(min=1, help="Prompts of each category.")] = 1,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens decoded a prompt.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of the final, interleaved.")] = 5,
    write: Annotated[bool, typer.Option(help="Make the best the folder's own way.")] = True,
    quiet: Quiet = False,
) -> None:
    """Find the draft that decodes a folder fastest, and make it the folder's way."""
    from compose.contract import TuneJob
    from compose.terminal.live.progress import ask_shown
    from compose.terminal.show import print_tuned

    job = TuneJob(folder, prompts, limit, new_tokens, repeats, write)
    tuned = ask_shown(job, f"tune-draft {folder}", quiet=quiet)
    print_tuned(console(), tuned)
    typer.echo(json.dumps(tuned))


@app.command()
def doctor() -> None:
    """Show what can run here, what is missing, and how to put it right."""
    from compose.terminal.doctor import examine
    from compose.terminal.show import print_findings

    findings = examine()
    print_findings(console(), findings)
    raise typer.Exit(any(finding.status == "missing" for finding in findings))


@app.command()
def stages() -> None:
    """Print which stage may follow which, and the rule where it may not."""
    from compose.planning.composition import as_markdown

    typer.echo(as_markdown())


@app.command()
def schema() -> None:
    """Print the language as JSON Schema, for editors."""
    from compose.language.parse import to_json_schema

    typer.echo(json.dumps(to_json_schema(), indent=2))


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
