"""The command `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, cast

import typer

from compose.terminal.commands.options import (
    AsEvents,
    DeviceName,
    DraftModel,
    KeepBlocks,
    Out,
    Quiet,
)
from compose.terminal.commands.pipelines import settings_of_run

QUALITY = "Options of quality"


def bench(
    folders: Annotated[
        list[Path], typer.Argument(metavar="FOLDER", help="Model folders, or GGUF files.")
    ],
    systems: Annotated[
        list[str] | None,
        typer.Option(
            "--system",
            metavar="SYSTEM",
            help="Way of decoding: plain (the default), skip:BUDGET or draft:BUDGET (speculative"
            " decoding). BUDGET is the share of the attention and MLP compute that is not"
            " skipped. draft:BUDGET can have the suffixes +auto, +int4, +int3, +int2, +nf4,"
            " +int4-head, +learned, +model (the model of --draft-model), +lookup, +LENGTH and"
            " +verifyBUDGET. skip:BUDGET and draft:BUDGET can have the suffix +promptBUDGET, the"
            " budget for prefill. Every way of decoding can have the suffix +int8-kv (8-bit KV"
            " cache) and a prefix that names a backend, as in gathered:plain."
            " docs/reference/cli.md explains all suffixes."
            " The baseline is the first folder with the first way of decoding.",
        ),
    ] = None,
    draft_model: DraftModel = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PEER",
            help="Also measure the model of the first folder in another inference engine:"
            " llama.cpp:q4_k_m, openvino:int4, onnxruntime:int4, transformers,"
            " transformers:compiled, ...",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            metavar="ROWS",
            min=1,
            help="Batch size: number of texts that are decoded together; 1 by default.",
        ),
    ] = None,
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option(
            metavar="COUNT",
            min=1,
            help="Length of the prompt in tokens; 128 by default. All prompt lengths after the"
            " first are measured with a batch size of 1.",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="PROMPTS",
            help="Prompts for the speed measurement: a JSON Lines file with a category for each"
            " prompt, or the name of a prompt set that ships with gateskip.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            min=1,
            help="Number of prompts per category in each round; rounds use different prompts.",
        ),
    ] = None,
    new_tokens: Annotated[
        int,
        typer.Option(metavar="COUNT", min=2, help="Number of tokens to decode after each prompt."),
    ] = 128,
    repeats: Annotated[
        int,
        typer.Option(
            metavar="COUNT",
            min=1,
            help="Number of rounds; in each round, all models and ways of decoding are measured"
            " one after another.",
        ),
    ] = 5,
    min_seconds: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="In each round, decode with each combination of model and decoding method for at"
            " least this many seconds.",
        ),
    ] = 2.0,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="NUMBER", min=0.0, help="Sampling temperature; 0 means greedy decoding."
        ),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            min=0.01,
            max=1.0,
            help="Sample only from the most likely tokens whose probabilities add up to this"
            " number.",
        ),
    ] = 1.0,
    one_process: Annotated[
        bool,
        typer.Option(
            show_default=False,
            help="Measure all folders in one process, because speed can differ between two"
            " processes.",
        ),
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(metavar="COUNT", min=1, help="Number of threads; by default, one per core."),
    ] = None,
    quality: Annotated[
        bool,
        typer.Option(
            show_default=False,
            help="Also measure perplexity, KL and task scores.",
            rich_help_panel=QUALITY,
        ),
    ] = False,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Text on which perplexity and KL are measured. If several texts are given, the"
            " first available text is used.",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            metavar="COUNT",
            min=2,
            help="Number of tokens on which perplexity and KL are measured.",
            rich_help_panel=QUALITY,
        ),
    ] = 8192,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="An lm-eval task to score; the option can be given several times.",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    allow_code: Annotated[
        bool,
        typer.Option(
            show_default=False,
            help="Let the task humaneval run code that a model writes, in a child process without"
            " network and with limits on time, memory and files.",
            rich_help_panel=QUALITY,
        ),
    ] = False,
    questions: Annotated[
        int,
        typer.Option(
            metavar="COUNT",
            min=1,
            help="Maximum number of questions that are asked in each task.",
            rich_help_panel=QUALITY,
        ),
    ] = 500,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the run; bench-FOLDER by default."),
    ] = None,
    keep_blocks: KeepBlocks = False,
    device: DeviceName = "cpu",
    out: Out = Path("runs"),
    quiet: Quiet = False,
    json_lines: AsEvents = False,
) -> None:
    """Measure and compare the speed of models, ways of decoding and other inference engines.
    With --quality, the command also measures quality."""
    from compose.assets import default_cache
    from compose.contract import Device
    from compose.planning.bench_plan import bench_plan, default_name
    from compose.processes.executors import make_executor
    from compose.processes.source_folder import as_folders
    from compose.terminal.bench import benchmark_of, print_bench
    from compose.terminal.live.run_shown import run_shown

    benchmark = benchmark_of(
        batches=batch or [1],
        contexts=prompt_tokens or [128],
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
        allow_code=allow_code,
        questions=questions,
    )
    folders = as_folders(folders, default_cache(), keep_blocks=keep_blocks)
    title = name or default_name(folders[0])
    where = cast(Device, device)
    drafts = as_folders([draft_model] if draft_model else [], default_cache(), keep_blocks=None)
    planned = bench_plan(title, folders, systems or [], against or [], benchmark, where, *drafts)
    result = run_shown(
        planned,
        settings_of_run(out, again=True),
        make_executor("local", threads),
        quiet=quiet,
        json_lines=json_lines,
        table=print_bench,
    )
    raise typer.Exit(result.exit_code)
