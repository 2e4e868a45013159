"""One server process: the model, its scheduler in a thread, and uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from transformers.utils.logging import disable_progress_bar

from compose.errors import UserError
from compose.serve.api.generation import Scheduler
from compose.serve.app import Service
from compose.serve.metrics import Metrics
from compose.serve.model import ServedModel, mode_text
from compose.serve.port import log_lines, url_of
from compose.serve.settings import ServeSettings
from gateskip.serving.scheduler import Scheduler as NativeScheduler

LOG = logging.getLogger("gateskip.serve")
DRAIN_S = 30.0
"""Seconds that answers may take to end after SIGTERM."""
SHARE_S = 1.0
"""Seconds between two times at which a replica writes its counts for the others."""


class ModelServer(uvicorn.Server):
    """Serves one model until SIGTERM or SIGINT; answers that run may end first."""

    def __init__(
        self, settings: ServeSettings, model: ServedModel, scheduler: Scheduler, metrics: Metrics
    ) -> None:
        self._scheduler, self._metrics = scheduler, metrics
        self.service = Service(settings, model, scheduler, metrics)
        self._drained: threading.Thread | None = None
        config = uvicorn.Config(
            self.service.app(),
            log_config=None,
            access_log=False,
            server_header=False,
            lifespan="off",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=int(DRAIN_S) + 5,
        )
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take no more requests; the second signal ends those that run."""
        self.drain()
        super().handle_exit(sig, frame)

    def drain(self) -> None:
        """Take no more requests, and end the scheduler when those that run have ended."""
        if self._drained is None:
            self.service.draining = True
            self._drained = threading.Thread(target=self._drain, name="drain", daemon=True)
            self._drained.start()

    def _drain(self) -> None:
        self._scheduler.drain(DRAIN_S)
        self._scheduler.close()

    def run_on(self, bound: socket.socket, on_ready: Callable[[], None]) -> None:
        """Serve on a bound socket until a signal; `on_ready` is called once requests are taken."""
        asyncio.run(self._served(bound, on_ready))
        self._scheduler.close()

    async def _served(self, bound: socket.socket, on_ready: Callable[[], None]) -> None:
        async with _beside(self._when_started(on_ready)), _beside(self._share()):
            await self.serve(sockets=[bound])

    async def _when_started(self, on_ready: Callable[[], None]) -> None:
        while not self.started:
            await asyncio.sleep(0.01)
        on_ready()

    async def _share(self) -> None:
        while self._metrics.shared:
            await asyncio.sleep(SHARE_S)
            self._metrics.share(self._scheduler.snapshot())


@contextlib.asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run a coroutine for as long as the context lasts."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def serve_one(
    settings: ServeSettings,
    bound: socket.socket,
    on_ready: Callable[[str], None],
    *,
    replica: int = 0,
    counts: Path | None = None,
) -> None:
    """Load the model and serve it until SIGTERM or SIGINT.

    `on_ready` is given one line on the server. Raises as `ServedModel` and `make_prefix_folder`.
    """
    log_lines("" if counts is None else f" replica {replica}")
    if settings.prefix_dir is not None:
        make_prefix_folder(settings.prefix_dir)
    LOG.info("loading %s; with drafts this can take minutes", settings.folder.name)
    disable_progress_bar()  # of weights, by transformers
    model = ServedModel(settings)
    scheduler = scheduler_of(model)
    server = ModelServer(settings, model, scheduler, Metrics(replica, counts))
    limits = model.limits
    line = (
        f"{url_of(bound)} serves {' and '.join(model.names)}: {mode_text(model.settings)},"
        f" up to {limits.rows} answers at the same time, {limits.context} tokens each"
    )
    # After a stop, uvicorn raises the signal again for the handlers that were there before.
    before = {number: signal.signal(number, _ignore) for number in _SIGNALS}
    try:
        server.run_on(bound, lambda: on_ready(line))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_prefix_folder(folder: Path) -> None:
    """Make a folder. Raises UserError where no file can be written to it."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        fix = "give --prefix-dir a folder that you can write to"
        raise UserError(f"{folder}: {error.strerror or error}", fix=fix) from error


def scheduler_of(model: ServedModel) -> NativeScheduler:
    """A running scheduler for the model. Raises UserError where it cannot have one."""
    try:
        scheduler = NativeScheduler(model.decoder, model.limits)
    except ValueError as error:
        fix = "serve a smaller context or fewer rows (--max-context, --max-rows)"
        if model.decoder.fallback is not None:
            fix = f"the backend native does not run here: {model.decoder.fallback}"
        raise UserError(f"{model.names[-1]} cannot be served: {error}", fix=fix) from error
    model.limits = scheduler.limits
    scheduler.start()
    return scheduler


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _ignore(*_: object) -> None:
    """Do nothing: the server has stopped already."""
