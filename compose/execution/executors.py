"""Where workers run: as processes of this machine, or as Ray actors on many.

A worker is `python -m compose.workers.main ROLE JOB.json`. It reads commands as JSON lines on
stdin and answers as JSON lines on stdout; all else that it or a library prints goes to its log
file. The Ray executor starts the very same process from an actor on another node.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import psutil

from compose.errors import (
    ArtifactError,
    AssetError,
    ComposeError,
    StepError,
    UserError,
    suggest,
)
from compose.store import write_json

Role = Literal[
    "step",
    "check",
    "speak",
    "cell",
    "answer",
    "insight",
    "race",
    "tune",
    "gguf",
    "probe",
]
Message = dict[str, Any]
LOG_TAIL_LINES = 25
GRACE_S = 5.0
"""How long a worker that was asked to stop may take before it is killed."""

LISTEN_S = 1.0
"""How often a silent worker is looked after."""

MOST_WORKERS = 2
WORKER_ROOM = 6_000_000_000
"""Free memory, in bytes, that a further worker side by side asks for."""

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
)


class Remote(Protocol):
    """A running worker."""

    def send(self, message: Message) -> None:
        """Give it a command."""

    def receive(self) -> Message:
        """Wait for its next message.

        Raises:
            StepError: the worker died; the message says how, and holds the end of its log.
        """

    def stop(self) -> None:
        """End it and everything it started; a second call does nothing."""


class Executor(Protocol):
    """Starts workers."""

    slots: int
    """How many workers may compute at the same time."""
    parks: bool
    """Whether every worker is on this machine, so that one may be timed later on."""
    timed_threads: int
    """Threads of a worker while it is timed."""

    def start(self, role: Role, job: Path, log: Path, *, here: bool = False) -> Remote:
        """Start a worker on a job file; `here` asks for the machine that this process is on."""

    def close(self) -> None:
        """End what the executor itself started."""


def worker_environment(threads: int | None) -> dict[str, str]:
    """The environment of a worker: this one's, with the thread count and the way to our code."""
    environment = dict(os.environ)
    if threads is not None:
        environment.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment["PYTHONHASHSEED"] = "0"
    environment["PYTHONFAULTHANDLER"] = "1"
    environment["PYTHONUNBUFFERED"] = "1"
    here = str(Path(__file__).resolve().parents[2])
    known = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    environment["PYTHONPATH"] = os.pathsep.join([*known, here] if here not in known else known)
    return environment


def worker_command(role: Role, job: Path) -> list[str]:
    """A worker's command; -P keeps a folder `compose` where the user stands from being taken."""
    return [sys.executable, "-P", "-m", "compose.workers.main", role, str(job)]


class LocalRemote:
    """A worker that is a child of this process, in a process group of its own."""

    def __init__(self, role: Role, job: Path, log: Path, threads: int | None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.stopped = False
        self._heard = b""
        self.log_start = log.stat().st_size if log.exists() else 0
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                worker_command(role, job),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=worker_environment(threads) | {"GATESKIP_PARENT": str(os.getpid())},
                bufsize=0,
                start_new_session=True,  # Ctrl-C is for the runner, which then ends its workers
            )

    def send(self, message: Message) -> None:
        """Give it a command; a worker that is already dead is noticed by `receive`."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")

    def receive(self) -> Message:
        """The worker's next message; StepError when it died without one."""
        while b"\n" not in self._heard:
            if not self._hear():
                raise StepError(self._obituary())
        line, _, self._heard = self._heard.partition(b"\n")
        message: Message = json.loads(line)
        return message

    def _hear(self) -> bool:
        """Read what the worker says; False when it is dead and has said all.

        The pipe alone does not tell: children that the worker forked may hold it open.
        """
        assert self.process.stdout is not None
        try:
            while not select.select([self.process.stdout], [], [], LISTEN_S)[0]:
                if self._ended():
                    return False
            said = os.read(self.process.stdout.fileno(), 1 << 16)
        except (OSError, ValueError):  # another thread stopped the worker and closed the pipe
            return False
        self._heard += said
        return bool(said)

    def stop(self) -> None:
        """End the worker's whole process group: first kindly, then surely."""
        if self.stopped:
            return
        self.stopped = True
        if not self._exited(0.0):
            self._signal(signal.SIGTERM)
            self._exited(GRACE_S)
        self._signal(signal.SIGKILL)  # also whatever the worker itself had started
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # a command that it never read
                    pipe.close()

    def _signal(self, number: signal.Signals) -> None:
        # macOS denies it for a group of zombies
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def _exited(self, seconds: float) -> bool:
        """Whether it ended within `seconds`. It stays a zombie, so its group id is not reused."""
        end = time.monotonic() + seconds
        while not self._ended():
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)
        return True

    def _ended(self) -> bool:
        if not hasattr(os, "waitid"):  # macOS, before Python 3.13
            return self.process.poll() is not None
        how = os.WEXITED | os.WNOHANG | os.WNOWAIT
        try:
            return os.waitid(os.P_PID, self.process.pid, how) is not None
        except ChildProcessError:  # another thread has waited for it
            return True

    def _obituary(self) -> str:
        self._exited(GRACE_S)
        self.stop()
        code = self.process.wait()
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                how += " (out of memory is the usual reason)"
        else:
            how = f"ended with exit code {code}"
        return f"the worker {how} and said no more; its log {self.log.name} ends:\n{self._tail()}"

    def _tail(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            lines = file.read().decode("utf-8", "replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-LOG_TAIL_LINES:]) or "    (empty)"


class LocalExecutor:
    """Workers on this machine: a few side by side, with the cores shared out between them.

    Much of a worker's time is single-threaded (imports, loading, tokenizing), so two workers with
    one core each end sooner than one after the other with two. What is timed (`here`) runs alone
    and has all threads.
    """

    parks = True

    def __init__(self, threads: int | None = None, workers: int | None = None) -> None:
        self.threads = threads
        self.timed_threads = cores = threads or os.cpu_count() or 1
        room = psutil.virtual_memory().available // WORKER_ROOM
        self.slots = workers or max(1, min(cores, room, MOST_WORKERS))
        self.share = max(1, cores // self.slots)

    def start(self, role: Role, job: Path, log: Path, *, here: bool = False) -> Remote:
        """Start a worker as a child process."""
        return LocalRemote(role, job, log, self.threads if here else self.share)

    def close(self) -> None:
        """Nothing to end: workers end with `stop`."""


class RayRemote:
    """A worker that is a child of a Ray actor."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self.ray, self.actor = ray, actor
        self.stopped = False

    def send(self, message: Message) -> None:
        """Give it a command."""
        self._call(self.actor.send, message)

    def receive(self) -> Message:
        """The worker's next message; StepError when it, or its node, died."""
        message: Message = self._call(self.actor.receive)
        return message

    def stop(self) -> None:
        """End the worker, then the actor."""
        if self.stopped:
            return
        self.stopped = True
        # A RayError here: the node is gone, and the worker with it.
        with contextlib.suppress(self.ray.exceptions.RayError):
            self.ray.get(self.actor.stop.remote(), timeout=2 * GRACE_S)
        self.ray.kill(self.actor)

    def _call(self, method: Any, *arguments: Any) -> Any:
        try:
            return self.ray.get(method.remote(*arguments))
        except self.ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, StepError):
                raise StepError(error.cause.message) from None
            raise
        except self.ray.exceptions.RayError as error:
            raise StepError(f"the Ray node of a worker failed: {error}") from error


class RayExecutor:
    """Workers on a Ray cluster. Runs, store and caches must be in folders that all nodes share.

    Steps and quality measurements run side by side, as many as the cluster has room for. Speed is
    measured on the node where `gateskip run` stands, so that cells stay comparable.
    """

    parks = False

    def __init__(
        self, threads: int | None = None, workers: int | None = None, address: str | None = None
    ) -> None:
        self.ray = _import_ray()
        self.threads = self.timed_threads = threads or 1
        self.started = not self.ray.is_initialized()
        if self.started:
            address = address or os.environ.get("RAY_ADDRESS")
            self.ray.init(address=address, log_to_driver=False, include_dashboard=False)
        cores = int(self.ray.cluster_resources().get("CPU", 1))
        self.slots = workers or max(1, cores // self.threads)

    def start(self, role: Role, job: Path, log: Path, *, here: bool = False) -> Remote:
        """Start an actor that starts the worker. One that is `here` only holds a place to wait."""
        options: dict[str, Any] = {"num_cpus": self.threads, "max_restarts": 0}
        if here:
            strategy = self.ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
            node = self.ray.get_runtime_context().get_node_id()
            options |= {"num_cpus": 0, "scheduling_strategy": strategy(node, soft=False)}
        actor = self.ray.remote(LocalRemote).options(**options)
        return RayRemote(self.ray, actor.remote(role, job.resolve(), log.resolve(), self.threads))

    def close(self) -> None:
        """Leave the cluster, if this executor joined it."""
        if self.started:
            self.ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError as error:
        raise UserError(
            "the executor 'ray' needs the package ray, which is not installed",
            fix="pip install 'gateskip-compose[ray]'",
        ) from error
    return ray


EXECUTORS: Mapping[str, Callable[[int | None, int | None], Executor]] = {
    "local": LocalExecutor,
    "ray": RayExecutor,
}


def make_executor(name: str, threads: int | None, workers: int | None = None) -> Executor:
    """The executor of that name, with at most `workers` workers side by side.

    Raises:
        UserError: there is none of that name, or its package is not installed.
    """
    if name not in EXECUTORS:
        raise UserError(f"there is no executor {name!r}: {suggest(name, EXECUTORS)}")
    return EXECUTORS[name](threads, workers)


def await_answer(remote: Remote, listen: Callable[[Message], None] | None = None) -> Any:
    """The result in a worker's next answer; other messages before it go to `listen`.

    Raises:
        ComposeError: what the worker raised, with its traceback as a note.
        StepError: the worker died.
    """
    while True:
        message = remote.receive()
        if "ok" not in message:
            if listen is not None:
                listen(message)
        elif message["ok"]:
            return message["result"]
        else:
            raise raised_by_worker(message)


def raised_by_worker(message: Message) -> ComposeError:
    """The exception that a worker's answer tells of."""
    kinds: dict[str, type[ComposeError]] = {
        each.__name__: each for each in (AssetError, ArtifactError)
    }
    error = kinds.get(message["kind"], StepError)(message["error"])
    error.add_note(message["traceback"])
    return error


def ask_once(
    role: Role, job: Mapping[str, Any], listen: Callable[[Message], None] | None = None
) -> Any:
    """Run one worker of this machine on a job that needs no folder of its own; its result.

    Raises as `await_answer`.
    """
    with tempfile.TemporaryDirectory(prefix="gateskip-") as folder:
        file = Path(folder) / f"{role}.json"
        write_json(file, job)
        remote = LocalRemote(role, file, file.with_suffix(".log"), None)
        try:
            return await_answer(remote, listen)
        finally:
            remote.stop()
