"""Arguments and options that several commands take, each stated once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, get_args

import typer

from compose.contract import Device
from compose.errors import UserError
from compose.terminal.meant import refuse_model

DEVICES = get_args(Device)


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


def known_device(name: str) -> str:
    """The name of a device. UserError for another one."""
    if name not in DEVICES:
        raise UserError(f"--device {name}: no such device", fix=f"name {' or '.join(DEVICES)}")
    return name


PipelineFile = Annotated[
    Path,
    typer.Argument(
        help="The pipeline file (YAML), which lists the variants to make and measure.",
        metavar="FILE",
        callback=no_model,
    ),
]
RunDir = Annotated[
    Path,
    typer.Argument(
        help="The folder of a run, such as runs/NAME.", metavar="RUN_DIR", callback=no_model_name
    ),
]
ModelFolder = Annotated[
    Path, typer.Argument(help="A model folder, or a GGUF file.", metavar="FOLDER")
]
Out = Annotated[
    Path,
    typer.Option(metavar="FOLDER", help="The folder in which runs store their results and models."),
]
ExecutorName = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Where stages and measurements run: on this machine (local) or on a Ray cluster"
        " (ray).",
        autocompletion=words("local", "ray"),
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        metavar="COUNT",
        min=1,
        help="Maximum number of processes that run at the same time. With --workers 1, one"
        " process uses all cores.",
    ),
]
DeviceName = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="Where the model runs: cpu or cuda (never run on a GPU).",
        autocompletion=words(*DEVICES),
        callback=known_device,
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Show only failures and the result.")]
AsEvents = Annotated[
    bool,
    typer.Option(
        "--json-lines",
        help="Print progress events as JSON, one event per line (docs/progress.md), and all other"
        " text to stderr.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
KeepBlocks = Annotated[
    bool,
    typer.Option("--keep-blocks", help="Keep the quantized weights of a GGUF file as integers."),
]
BlocksOrNot = Annotated[
    bool | None,
    typer.Option(
        "--keep-blocks/--dequantize",
        help="Keep the quantized weights of a GGUF file as integers (the default), or dequantize"
        " them to bfloat16.",
        show_default=False,
    ),
]

# --- Bounds and aims: `pick`, `export`, `search` -------------------------------------------------

AtMostKl = Annotated[
    float | None,
    typer.Option(
        metavar="NATS",
        help="Maximum KL divergence from the predictions of the baseline (the"
        " original model by default), in nats per token.",
    ),
]
AtMostPerplexityRatio = Annotated[
    float | None,
    typer.Option(
        metavar="RATIO",
        help="Maximum ratio of a variant's perplexity to the perplexity of the baseline (the"
        " original model by default).",
    ),
]
AtMostMb = Annotated[
    float | None,
    typer.Option(metavar="MB", help="Maximum size of the weight files on disk, in megabytes."),
]
MinRetained = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Minimum ratio of a variant's task score to the task score of the baseline (the"
        " original model by default), from 0 to 1.",
    ),
]

# --- Answers: `chat`, `generate`, `insight` ------------------------------------------------------

MaxNewTokens = Annotated[
    int, typer.Option(metavar="COUNT", min=1, help="Maximum number of tokens in an answer.")
]
Budget = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        min=0.0,
        max=1.0,
        help="Share of the attention and MLP compute that is not skipped; works only if the model"
        " has gates.",
    ),
]
Speculate = Annotated[
    bool | None,
    typer.Option(
        help="Decode with or without drafts (speculative decoding); by default, the model"
        " folder decides."
    ),
]
DraftModel = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="A second model that drafts tokens: a folder or a GGUF file with the same tokenizer.",
    ),
]
Temperature = Annotated[
    float,
    typer.Option(metavar="NUMBER", min=0.0, help="Sampling temperature; 0 means greedy decoding."),
]
TopK = Annotated[
    int,
    typer.Option(
        metavar="COUNT",
        min=0,
        help="Sample only from the COUNT most likely tokens; 0 means all tokens.",
    ),
]
TopP = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        min=0.01,
        max=1.0,
        help="Sample only from the most likely tokens whose probabilities add up to this number.",
    ),
]
Seed = Annotated[int, typer.Option(metavar="NUMBER", min=0, help="Seed for sampling.")]
