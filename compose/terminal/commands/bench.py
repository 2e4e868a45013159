"""The command `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compose.terminal.commands.options import AsEvents, KeepBlocks, Out, Quiet
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
            help="Way of decoding: plain (the default), skip:BUDGET or draft:BUDGET. draft can"
            " have the suffixes +auto, +int4, +int3, +int2, +nf4, +int4-head, +learned, +lookup,"
            " +LENGTH and +verifyBUDGET. skip and draft can have +promptBUDGET, a budget for"
            " prefill. Every system can end with +int8-kv (KV cache in 8 bits), and begin with a"
            " backend, as in gathered:plain. The first folder with the first system is the"
            " baseline.",
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PEER",
            help="Also run the model of the first folder in another engine: llama.cpp:q4_k_m,"
            " openvino:int4, onnxruntime:int4, transformers, transformers:compiled, ...",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            metavar="ROWS",
            min=1,
            help="Batch size: number of texts decoded together; 1 by default.",
        ),
    ] = None,
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option(
            metavar="COUNT",
            min=1,
            help="Length of the prompt in tokens; 128 by default. All lengths after the first are"
            " measured with a batch size of 1.",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            metavar="PROMPTS",
            help="Decode these prompts, which have categories: an alias or a JSON Lines file.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            min=1,
            help="Number of prompts per category and round; each round uses other prompts.",
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
            help="Number of rounds; each round measures all systems in turn.",
        ),
    ] = 5,
    min_seconds: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0,
            help="Minimum decoding time per system and round, in seconds.",
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
            help="Text for perplexity and KL. If several texts are given, the first available text"
            " is used.",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            metavar="COUNT",
            min=2,
            help="Number of tokens for perplexity and KL.",
            rich_help_panel=QUALITY,
        ),
    ] = 8192,
    task: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="A task to score; can be given several times.",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    allow_code: Annotated[
        bool,
        typer.Option(
            show_default=False,
            help="Let the task humaneval run the code that a model writes: in a child process with"
            " limits of time, memory and files, without network.",
            rich_help_panel=QUALITY,
        ),
    ] = False,
    questions: Annotated[
        int,
        typer.Option(
            metavar="COUNT",
            min=1,
            help="Maximum number of questions per task.",
            rich_help_panel=QUALITY,
        ),
    ] = 500,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Name of the run; bench-FOLDER by default."),
    ] = None,
    keep_blocks: KeepBlocks = False,
    out: Out = Path("runs"),
    quiet: Quiet = False,
    json_lines: AsEvents = False,
) -> None:
    """Measure and compare models, ways of decoding and other engines."""
    from compose.assets import default_cache
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
    planned = bench_plan(title, folders, systems or [], against or [], benchmark)
    result = run_shown(
        planned,
        settings_of_run(out, again=True),
        make_executor("local", threads),
        quiet=quiet,
        json_lines=json_lines,
        table=print_bench,
    )
    raise typer.Exit(result.exit_code)
