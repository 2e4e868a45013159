"""Several servers on one port: each on its own cores, started again when it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import signal
import sys
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from compose.capacity import usable_cores
from compose.errors import ComposeError, StepError, UserError
from compose.processes.endings import ending_of_code
from compose.processes.worker_process import worker_environment
from compose.serve.port import bound_socket, log_lines
from compose.serve.settings import ServeSettings

LOG = logging.getLogger("gateskip.serve")
WAITS_S = (0.0, 1.0, 5.0, 30.0)
"""Seconds before a replica is started again, by how often it ended soon after its start."""
SOON_S = 30.0


def shares_of_cores(replicas: int) -> list[list[int]]:
    """The cores of this process in equal shares, neighbours together.

    Raises UserError where there are fewer cores than replicas.
    """
    cores = usable_cores()
    if replicas > len(cores):
        raise UserError(
            f"{replicas} replicas need as many cores, and there are {len(cores)}",
            fix=f"use --replicas {len(cores)} or fewer",
        )
    size = len(cores) // replicas
    return [cores[size * i : size * (i + 1)] for i in range(replicas)]


def serve_replicas(settings: ServeSettings, on_ready: Callable[[str], None]) -> None:
    """Serve with `settings.replicas` processes until SIGTERM or SIGINT.

    Raises UserError where the first replica cannot start.
    """
    log_lines("")
    shares = shares_of_cores(settings.replicas)
    bound_socket(settings.host, settings.port).close()  # refuses a port that another server has
    held = bound_socket(settings.host, settings.port, shared=True)
    settings = replace(settings, port=held.getsockname()[1])
    with held, tempfile.TemporaryDirectory(prefix="gateskip-") as folder:
        asyncio.run(_Replicas(settings, shares, Path(folder), on_ready).run())


class _Replicas:
    """The processes, and the wish to stop."""

    def __init__(
        self,
        settings: ServeSettings,
        shares: Sequence[list[int]],
        counts: Path,
        on_ready: Callable[[str], None],
    ) -> None:
        self._settings, self._shares, self._counts = settings, shares, counts
        self._on_ready = on_ready
        self._processes: dict[int, Process] = {}
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Start all, keep them alive, and stop them by SIGTERM."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        keepers: list[asyncio.Task[None]] = []
        try:
            line = await self._until_stopped(self._start(0))  # it fills the caches for the others
            if line is not None:
                keepers = [
                    asyncio.create_task(self._keep(i, started=i == 0))
                    for i in range(len(self._shares))
                ]
                self._on_ready(f"{line}; {len(self._shares)} replicas")
                await self._stop.wait()
        finally:
            for keeper in keepers:
                keeper.cancel()
            await self._end_all()

    async def _until_stopped(self, work: Any) -> Any:
        """The result of `work`; None where a signal comes first."""
        task, stop = asyncio.ensure_future(work), asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if task.done():
            return task.result()
        task.cancel()
        return None

    async def _start(self, number: int) -> str:
        """Start a replica; its line when it serves. Raises ComposeError where it does not."""
        cores = self._shares[number]
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "compose.serve.replica"),
            stdin=PIPE,
            stdout=PIPE,
            env=worker_environment(len(cores)),
            start_new_session=True,  # Ctrl-C is for this process, which then stops its replicas
        )
        self._processes[number] = process
        assert process.stdin is not None and process.stdout is not None
        settings = json.loads(self._settings.to_json())
        job = {"settings": settings, "replica": number, "cores": cores}
        process.stdin.write(json.dumps({**job, "counts": str(self._counts)}).encode() + b"\n")
        with contextlib.suppress(ConnectionError):
            await process.stdin.drain()
        told = json.loads(await process.stdout.readline() or b"{}")
        if "ready" in told:
            return str(told["ready"])
        code = await process.wait()
        if "error" in told:
            raise (UserError if code == UserError.exit_code else StepError)(told["error"])
        raise StepError(f"replica {number} did not start: {_how(code)}")

    async def _keep(self, number: int, *, started: bool) -> None:
        """Start a replica again whenever it ends."""
        early = 0
        while True:
            began = time.monotonic()
            if started:
                code = await self._processes[number].wait()
                LOG.error("replica %d ended (%s): it is started again", number, _how(code))
            early = early + 1 if time.monotonic() - began < SOON_S else 0
            (self._counts / f"{number}.json").unlink(missing_ok=True)
            await asyncio.sleep(WAITS_S[min(early, len(WAITS_S)) - 1] if early else 0)
            try:
                await self._start(number)
                started = True
                LOG.info("replica %d serves on cores %s", number, self._shares[number])
            except ComposeError as error:
                LOG.error("replica %d: %s", number, error)
                started = False

    async def _end_all(self) -> None:
        """Let all replicas end their answers."""
        for process in self._processes.values():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        await asyncio.gather(*(process.wait() for process in self._processes.values()))


def _how(code: int) -> str:
    ending = ending_of_code(code)
    return f"exit code {code}" if ending.signal is None else f"killed by {ending.signal}"
