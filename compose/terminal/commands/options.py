"""Arguments and options that several commands take, each stated once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from compose.terminal.meant import refuse_model


def words(*choices: str) -> Callable[[], list[str]]:
    """What shell completion offers for an option."""
    return lambda: list(choices)


def no_model(ctx: typer.Context, file: Path) -> Path:
    """The pipeline file. UserError, with what to do, where a model is named instead."""
    refuse_model(str(file), f"`gateskip {ctx.info_name}` takes a pipeline file")
    return file


def no_model_name(ctx: typer.Context, folder: Path) -> Path:
    """The folder of a run. UserError, with what to do, where a model is named instead."""
    if not folder.is_dir():
        refuse_model(str(folder), f"`gateskip {ctx.info_name}` takes the folder of a run")
    return folder


PipelineFile = Annotated[
    Path, typer.Argument(help="The pipeline file (YAML).", metavar="FILE", callback=no_model)
]
RunDir = Annotated[
    Path,
    typer.Argument(
        help="The folder of a run: runs/NAME.", metavar="RUN_DIR", callback=no_model_name
    ),
]
ModelFolder = Annotated[
    Path, typer.Argument(help="A model folder, or a GGUF file.", metavar="FOLDER")
]
Out = Annotated[
    Path, typer.Option(metavar="FOLDER", help="The folder that holds runs and model folders.")
]
ExecutorName = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="Where work runs: local or ray.", autocompletion=words("local", "ray")
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="COUNT", min=1, help="Steps and cells at the same time; 1 gives each all cores."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show only failures and the result.")]
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

# --- Bounds and aims: `pick`, `export`, `search` -------------------------------------------------

AtMostKl = Annotated[
    float | None,
    typer.Option(metavar="NATS", help="Bound the KL divergence to the baseline, in nats a token."),
]
AtMostPerplexityRatio = Annotated[
    float | None,
    typer.Option(metavar="RATIO", help="Bound the perplexity, divided by the baseline's."),
]
AtMostMb = Annotated[
    float | None,
    typer.Option(metavar="MB", help="Bound the size of the weight files, in megabytes."),
]
MinRetained = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE", help="Keep at least this share of the baseline's quality, 0 to 1."
    ),
]

# --- Answers: `chat`, `generate`, `insight` ------------------------------------------------------

MaxNewTokens = Annotated[
    int, typer.Option(metavar="COUNT", min=1, help="Stop an answer after this many tokens.")
]
Budget = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        min=0.0,
        max=1.0,
        help="Compute this share of the branches and skip the rest; the folder needs gates.",
    ),
]
Speculate = Annotated[
    bool | None,
    typer.Option(help="Draft tokens and verify them, or do not; by default as the folder says."),
]
DraftModel = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Let another model with the same tokenizer draft: a folder, or a GGUF file.",
    ),
]
Temperature = Annotated[
    float, typer.Option(metavar="NUMBER", min=0.0, help="Sample at this temperature; 0 is greedy.")
]
TopK = Annotated[
    int,
    typer.Option(metavar="COUNT", min=0, help="Sample from the k most likely tokens; 0 is all."),
]
TopP = Annotated[
    float,
    typer.Option(
        metavar="SHARE", min=0.01, max=1.0, help="Sample from the tokens of this probability mass."
    ),
]
Seed = Annotated[int, typer.Option(metavar="NUMBER", min=0, help="Seed the sampling.")]
