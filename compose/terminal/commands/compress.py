"""The command `compress`: one model, made smaller and faster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compose.terminal.commands.options import AtMostKl, AtMostMb, Out, Quiet, Workers
from compose.terminal.commands.pipelines import settings_of_run


def compress(
    model: Annotated[
        str,
        typer.Argument(
            help="The model to compress: a Hugging Face hub id, a folder, a GGUF file, or a short"
            " name such as smollm2-135m-instruct.",
            metavar="MODEL",
        ),
    ],
    to: Annotated[Path, typer.Option(help="The folder for the compressed model.", metavar="DIR")],
    bits: Annotated[
        int | None,
        typer.Option(
            metavar="BITS",
            help="Bits per weight: 8, 4 or 3; by default, both 8 and 4 are tried.",
        ),
    ] = None,
    at_most_mb: AtMostMb = None,
    at_most_kl: AtMostKl = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Round the weights without calibration text; rounding takes minutes, and loses"
            " more quality.",
        ),
    ] = False,
    best: Annotated[
        bool,
        typer.Option(
            "--best",
            help="After rounding, also train the weights. Training can take hours, and reduces the"
            " loss of quality.",
        ),
    ] = False,
    drafts: Annotated[
        bool,
        typer.Option(
            help="Also try decoding with drafts (speculative decoding), which does"
            " not change the output."
        ),
    ] = True,
    gguf: Annotated[
        bool, typer.Option("--gguf", help="Also write the file DIR.gguf for llama.cpp.")
    ] = False,
    compressed_tensors: Annotated[
        bool,
        typer.Option(
            "--compressed-tensors", help="Also write the folder DIR-compressed-tensors for vLLM."
        ),
    ] = False,
    out: Out = Path("runs"),
    workers: Workers = None,
    quiet: Quiet = False,
) -> None:
    """Make a model smaller and faster, and show how much quality it loses.

    Without --bits and --at-most options, the result is the fastest variant with good quality: its
    perplexity is at most 5 % higher than the original model's, and its answers to test questions
    are not measurably worse.
    """
    from compose.recipes.compress import source_of
    from compose.recipes.recipe import Request, effort_of
    from compose.terminal.compress import compress_shown

    request = Request(
        model=source_of(model),
        to=to,
        bits=bits,
        at_most_mb=at_most_mb,
        at_most_kl=at_most_kl,
        effort=effort_of(quick=quick, best=best),
        drafts=drafts,
        gguf=gguf,
        compressed_tensors=compressed_tensors,
    )
    compress_shown(request, settings_of_run(out, again=False), workers, quiet=quiet)
