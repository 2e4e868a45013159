"""Executors by name: they start workers as processes of this machine, or through Ray on many
machines."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from compose.capacity import core_count, free_memory
from compose.contract import ANYWHERE, Needs, Role
from compose.errors import UserError, suggest
from compose.processes.fork_server import ForkServer
from compose.processes.worker_process import LocalWorker, Worker, start_process
from compose.results.environment import capture_environment

MAX_WORKERS = 2
BYTES_PER_WORKER = 6_000_000_000
"""Free memory, in bytes, that each further worker needs to run beside the others."""


class Executor(Protocol):
    """Starts workers."""

    slots: int
    """How many workers may compute at the same time."""
    local: bool
    """Whether every worker runs on this machine, so that one may be timed later."""
    timed_threads: int
    """Threads of a worker while it is timed."""

    attempts: int
    """How many times a worker is started in all, where its node is lost or SIGKILL ends it."""

    def start(self, role: Role, job: Path, log: Path, needs: Needs = ANYWHERE) -> Worker:
        """Start a worker on a job file, on a machine that meets `needs`; its output goes to
        `log`."""

    def environment(self, threads: int | None) -> dict[str, Any]:
        """The machine on which timed workers run: see `capture_environment`."""

    def free_bytes(self) -> int:
        """Free memory of that machine."""

    def close(self) -> None:
        """End the processes that the executor itself started."""


class TimedHere:
    """Part of an executor whose timed workers run on this machine."""

    def environment(self, threads: int | None) -> dict[str, Any]:
        """This machine."""
        return capture_environment(threads)

    def free_bytes(self) -> int:
        """Free memory of this machine."""
        return free_memory()


class LocalExecutor(TimedHere):
    """Workers on this machine: a few side by side, which share the cores.

    Much of a worker's time is single-threaded (imports, loading, tokenizing), so two workers with
    one core each finish sooner than one after the other with two cores. A timed worker
    (`Needs.here`) runs alone and has all threads.
    """

    local = True
    attempts = 1  # what took it away once would do so again

    def __init__(self, threads: int | None = None, workers: int | None = None) -> None:
        self.threads = threads
        self.timed_threads = cores = threads or core_count()
        fitting = free_memory() // BYTES_PER_WORKER
        self.slots = workers or max(1, min(cores, fitting, MAX_WORKERS))
        self.share = max(1, cores // self.slots)
        self._forks = ForkServer() if sys.platform == "linux" else None

    def start(self, role: Role, job: Path, log: Path, needs: Needs = ANYWHERE) -> Worker:
        """Start a worker as a child process."""
        threads = self.threads if needs.here else self.share
        start = self._forks.start if self._forks else start_process
        return LocalWorker(role, job, log, threads, needs.allowed, start)

    def close(self) -> None:
        """End the fork server. `stop` ends workers."""
        if self._forks is not None:
            self._forks.close()


def _ray_executor(threads: int | None, workers: int | None) -> Executor:
    from compose.processes.ray_executor import RayExecutor

    return RayExecutor(threads, workers)


EXECUTORS: Mapping[str, Callable[[int | None, int | None], Executor]] = {
    "local": LocalExecutor,
    "ray": _ray_executor,
}


def make_executor(name: str, threads: int | None, workers: int | None = None) -> Executor:
    """The executor of that name, with at most `workers` workers side by side.

    Raises:
        UserError: there is no executor of that name, or its package is not installed.
    """
    if name not in EXECUTORS:
        raise UserError(f"there is no executor {name!r}: {suggest(name, EXECUTORS)}")
    return EXECUTORS[name](threads, workers)
