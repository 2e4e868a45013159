"""The command `serve`: a model behind the API of OpenAI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compose.serve.settings import KEY_VARIABLE, ServeSettings
from compose.terminal.commands.options import (
    BlocksOrNot,
    Budget,
    ModelFolder,
    Speculate,
)


def serve(
    folder: ModelFolder,
    host: Annotated[
        str,
        typer.Option(
            metavar="ADDRESS", help="Address to listen on; 0.0.0.0 is reached by other machines."
        ),
    ] = ServeSettings.host,
    port: Annotated[
        int, typer.Option(metavar="PORT", min=0, max=65535, help="Port; 0 takes a free port.")
    ] = ServeSettings.port,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar=KEY_VARIABLE,
            help="API key that requests must contain. Other users of the machine can read the"
            " options of a command, so set the environment variable instead.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Another name of the model in requests, besides the folder name."
        ),
    ] = None,
    budget: Budget = None,
    speculate: Speculate = None,
    max_rows: Annotated[
        int,
        typer.Option(metavar="COUNT", min=1, help="Maximum number of answers decoded in parallel."),
    ] = ServeSettings.max_rows,
    max_context: Annotated[
        int | None,
        typer.Option(
            metavar="COUNT",
            min=2,
            help="Maximum number of tokens of a prompt and its answer together. By default, 4096,"
            " or the model's maximum if smaller.",
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(metavar="COUNT", min=1, help="Maximum number of answers that wait.")
    ] = ServeSettings.max_queue,
    max_body_kb: Annotated[
        int, typer.Option(metavar="KB", min=1, help="Maximum size of a request, in kilobytes.")
    ] = ServeSettings.max_body_kb,
    cache_mb: Annotated[
        int | None,
        typer.Option(
            metavar="MB",
            min=1,
            help="Maximum size of the KV cache, in megabytes; half of the free memory by default.",
        ),
    ] = None,
    prefix_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Store keys and values of prompts in this folder. A restarted server or another"
            " replica then reuses them for prompts that begin with the same tokens. The folder uses"
            " at most a tenth of the free disk.",
        ),
    ] = None,
    replicas: Annotated[
        int,
        typer.Option(
            metavar="COUNT",
            min=1,
            help="Number of server processes that share the port. Each has its own cores, its own"
            " copy of the model, and the limits above.",
        ),
    ] = ServeSettings.replicas,
    keep_blocks: BlocksOrNot = None,
) -> None:
    """Serve a model over HTTP with an OpenAI-compatible API."""
    from compose.extras import require
    from compose.terminal.commands.models import as_folder

    require("serve", but=["llguidance"])  # which only requests for JSON need
    settings = ServeSettings(
        folder=as_folder(folder, keep_blocks),
        host=host,
        port=port,
        name=name or (folder.stem if folder.is_file() else None),
        api_key=api_key or None,
        budget=budget,
        speculate=speculate,
        max_rows=max_rows,
        max_context=max_context,
        max_queue=max_queue,
        max_body_kb=max_body_kb,
        cache_mb=cache_mb,
        prefix_dir=prefix_dir,
        replicas=replicas,
    )
    if not settings.loopback and settings.api_key is None:
        typer.echo(
            f"warning: anyone who can reach {host} can use this server; set {KEY_VARIABLE}",
            err=True,
        )
    _serve(settings)


def _serve(settings: ServeSettings) -> None:
    """Serve until SIGTERM or Ctrl-C; one line on stdout says when requests are taken."""
    from compose.serve.port import bound_socket

    if settings.replicas > 1:
        from compose.serve.replicas import serve_replicas

        serve_replicas(settings, _ready)
        return
    bound = bound_socket(settings.host, settings.port)
    from compose.serve.server import serve_one  # torch, after what may be refused at once

    serve_one(settings, bound, _ready)


def _ready(line: str) -> None:
    print(line, flush=True)
