"""The commands on a model folder: `chat`, `generate`, `insight`, `tune-draft`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, cast

import typer
from rich.console import Console

from compose.terminal.commands.options import (
    AsJson,
    BlocksOrNot,
    Budget,
    DeviceName,
    DraftModel,
    MaxNewTokens,
    ModelFolder,
    Quiet,
    Seed,
    Speculate,
    Temperature,
    TopK,
    TopP,
)


def chat(
    folder: ModelFolder,
    max_new_tokens: MaxNewTokens = 1024,
    budget: Budget = None,
    speculate: Speculate = None,
    draft_model: DraftModel = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    device: DeviceName = "cpu",
    keep_blocks: BlocksOrNot = None,
) -> None:
    """Chat with a model in the terminal."""
    from compose.contract import ChatJob, Device
    from compose.terminal.chat import chat as chat_with

    folder = as_folder(folder, keep_blocks)
    draft = None if draft_model is None else as_folder(draft_model, None)
    sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    where = cast(Device, device)
    job = ChatJob(folder, max_new_tokens, budget, speculate, sampling, seed, draft, where)
    chat_with(job)


def generate(
    folder: ModelFolder,
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="The question or instruction for the model.")
    ],
    max_new_tokens: MaxNewTokens = 128,
    budget: Budget = None,
    speculate: Speculate = None,
    draft_model: DraftModel = None,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    stop: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="End the answer when the model writes this text."),
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Also print decode speed, settings and token counts.")
    ] = False,
    device: DeviceName = "cpu",
    keep_blocks: BlocksOrNot = None,
) -> None:
    """Answer one prompt with a model."""
    from compose.contract import AnswerJob, Device
    from compose.processes.worker_process import ask_once
    from compose.terminal.chat import show_text, stats_text

    folder = as_folder(folder, keep_blocks)
    draft = None if draft_model is None else as_folder(draft_model, None)
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
            draft_model=draft,
            device=cast(Device, device),
        ),
        show_text if streams else None,
    )
    typer.echo("" if streams else answer["text"])
    if stats:
        typer.echo(stats_text(answer), err=True)


def as_folder(source: Path, keep_blocks: bool | None) -> Path:
    """The model folder; how a GGUF file's weights are held goes to stderr."""
    from compose.assets import default_cache
    from compose.processes.source_folder import as_folders, how_read

    (folder,) = as_folders([source], default_cache(), keep_blocks=keep_blocks)
    if (note := how_read(source, folder)) is not None:
        typer.echo(note, err=True)
    return folder


def insight(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A model folder with gates.")],
    text: Annotated[
        str,
        typer.Option(
            metavar="TEXT", help="The text to colour, or @FILE to read the text from a file."
        ),
    ],
    budget: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0.0,
            max=1.0,
            help="Share of the attention and MLP compute that is not skipped; 0.8 by default.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write the coloured text to an HTML file."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Colour each token of a text by the share of attention and MLP compute that the token gets."""
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
        print_insight(Console(), shares)


def tune_draft(
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A model folder, such as an export.")
    ],
    prompts: Annotated[
        str,
        typer.Option(
            metavar="PROMPTS",
            help="Prompts for measuring the speed of decoding with drafts: a JSON Lines file, or"
            " the short name of prompts that gateskip contains.",
        ),
    ] = "prompts",
    limit: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT", min=1, help="Number of prompts that are used from each category."
        ),
    ] = 1,
    new_tokens: Annotated[
        int,
        typer.Option(metavar="COUNT", min=2, help="Number of tokens to decode after each prompt."),
    ] = 64,
    repeats: Annotated[
        int,
        typer.Option(
            metavar="COUNT",
            min=1,
            help="Number of times that the final comparison of drafts is repeated.",
        ),
    ] = 5,
    write: Annotated[
        bool,
        typer.Option(
            help="Store the fastest kind of draft in the model folder as its default; on by"
            " default.",
            show_default=False,
        ),
    ] = True,
    quiet: Quiet = False,
) -> None:
    """Find the kind of draft with which a model decodes fastest (speculative decoding), and store
    it in the model folder as the default."""
    from compose.contract import TuneJob
    from compose.terminal.live.progress import ask_shown
    from compose.terminal.show import print_tuned

    job = TuneJob(folder, prompts, limit, new_tokens, repeats, write)
    tuned = ask_shown(job, f"tune-draft {folder}", quiet=quiet)
    print_tuned(Console(), tuned)
    typer.echo(json.dumps(tuned))
