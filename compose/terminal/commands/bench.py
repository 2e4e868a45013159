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
            help="A way to decode the folders; plain by default. The others are skip:BUDGET and"
            " draft:BUDGET. draft takes +auto, +int4, +int3, +int2, +nf4, +int4-head, +learned,"
            " +lookup, +LENGTH and +verifyBUDGET. skip and draft take +promptBUDGET, a budget for"
            " prompts. Each takes +int8-kv (keys and values in 8 bits) and a backend in front, as"
            " in gathered:plain. All are compared with the first folder and system.",
        ),
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PEER",
            help="Another engine on the first folder: llama.cpp:q4_k_m, openvino:int4,"
            " onnxruntime:int4, transformers, transformers:compiled, ...",
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(metavar="ROWS", min=1, help="Rows that decode together; 1 by default."),
    ] = None,
    prompt_tokens: Annotated[
        list[int] | None,
        typer.Option(
            metavar="COUNT",
            min=1,
            help="Tokens of the prompt, 128 by default; further lengths are measured with one row.",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="PROMPTS", help="Prompts by category: an alias or a JSON Lines file."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            min=1,
            help="Prompts of each category in a round; each round has new ones.",
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(metavar="COUNT", min=2, help="Tokens that are decoded in one turn.")
    ] = 128,
    repeats: Annotated[
        int, typer.Option(metavar="COUNT", min=1, help="Rounds, in which all systems take turns.")
    ] = 5,
    min_seconds: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0, help="Seconds that each system decodes in a round."),
    ] = 2.0,
    temperature: Annotated[
        float,
        typer.Option(metavar="NUMBER", min=0.0, help="Sample at this temperature; 0 is greedy."),
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            metavar="SHARE",
            min=0.01,
            max=1.0,
            help="Sample from the tokens of this probability mass.",
        ),
    ] = 1.0,
    one_process: Annotated[
        bool,
        typer.Option(
            show_default=False,
            help="Time all folders in one process, so that no process is faster by chance.",
        ),
    ] = False,
    threads: Annotated[
        int | None, typer.Option(metavar="COUNT", min=1, help="Threads; all cores by default.")
    ] = None,
    quality: Annotated[
        bool,
        typer.Option(
            show_default=False,
            help="Also score perplexity, KL and tasks.",
            rich_help_panel=QUALITY,
        ),
    ] = False,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Text on which perplexity is measured; of several, the first that is available.",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(metavar="COUNT", min=2, help="Tokens of that text.", rich_help_panel=QUALITY),
    ] = 8192,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="A task to score.", rich_help_panel=QUALITY),
    ] = None,
    questions: Annotated[
        int,
        typer.Option(
            metavar="COUNT", min=1, help="Questions of each task.", rich_help_panel=QUALITY
        ),
    ] = 500,
    name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The name of the run; bench-FOLDER by default."),
    ] = None,
    keep_blocks: KeepBlocks = False,
    out: Out = Path("runs"),
    quiet: Quiet = False,
    json_lines: AsEvents = False,
) -> None:
    """Measure models, ways to decode them and other engines side by side."""
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
