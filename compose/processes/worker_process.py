"""A worker process and its messages: start, commands, answers, end.

A worker is `python -m compose.workers.main ROLE JOB.json`. It reads commands as JSON lines on stdin
and answers as JSON lines on stdout (`contract`). All other output of it or of a library goes to its
log file.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Protocol

from compose.contract import UNLIMITED, Allowed, Job, Message, Role, write_job
from compose.errors import (
    ArtifactError,
    AssetError,
    ComposeError,
    StepError,
    UserError,
    WorkerLost,
)
from compose.memory import most_held_by, oom_kills, peak_bytes
from compose.processes.endings import Ending, ending_of_code, lost

LOG_TAIL_LINES = 25
GRACE_S = 5.0
"""Seconds that a worker may take to stop before it is killed."""

POLL_S = 1.0
"""Seconds between two checks of a worker's end, memory and time."""

THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "RAYON_NUM_THREADS",
)


class Worker(Protocol):
    """A running worker."""

    def send(self, message: Mapping[str, Any]) -> None:
        """Send it a command."""

    def receive(self) -> Message:
        """Wait for its next message.

        Raises:
            WorkerLost: the worker ended; the message says how, with the end of its log.
        """

    def stop(self) -> None:
        """End it and everything it started; a second call does nothing."""


def scratch_of(log: Path) -> Path:
    """The folder for temporary files of workers that log beside `log`; after a kill they are still
    there."""
    return log.parent / ".scratch"


def remove_scratch(log: Path) -> None:
    """Remove the temporary files of workers that have ended."""
    shutil.rmtree(scratch_of(log), ignore_errors=True)


def worker_environment(threads: int | None, scratch: Path | None = None) -> dict[str, str]:
    """The environment of a worker: this process's, with the thread count, the path of this code,
    and the folder for its temporary files."""
    environment = dict(os.environ)
    if scratch is not None:
        environment["TMPDIR"] = str(scratch)
    if threads is not None:
        environment.update(dict.fromkeys(THREAD_VARIABLES, str(threads)))
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment["PYTHONHASHSEED"] = "0"
    environment["PYTHONFAULTHANDLER"] = "1"
    environment["PYTHONUNBUFFERED"] = "1"
    root = str(Path(__file__).resolve().parents[2])
    paths = [part for part in environment.get("PYTHONPATH", "").split(os.pathsep) if part]
    environment["PYTHONPATH"] = os.pathsep.join(paths if root in paths else [*paths, root])
    return environment


def worker_command(role: Role, job: Path) -> list[str]:
    """A worker's command line; -P ignores a folder named `compose` in the working directory."""
    return [sys.executable, "-P", "-m", "compose.workers.main", role, str(job)]


class Process(Protocol):
    """A worker's process: as much of `subprocess.Popen` as is used here."""

    pid: int
    stdin: IO[bytes] | None
    stdout: IO[bytes] | None
    returncode: int | None

    def poll(self) -> int | None:
        """The return code; None while it runs."""

    def wait(self) -> int:
        """Wait for its end; the return code."""


StartProcess = Callable[[Role, Path, Mapping[str, str], IO[bytes]], Process]
"""Starts a worker's process on a job file, in an environment, with its output to a file."""


def start_process(
    role: Role, job: Path, environment: Mapping[str, str], output: IO[bytes]
) -> Process:
    """Start a worker's process, which then imports what it needs."""
    return subprocess.Popen(
        worker_command(role, job),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=output,
        env=environment,
        bufsize=0,
        start_new_session=True,  # Ctrl-C is for the runner, which then ends its workers
    )


class LocalWorker:
    """A worker that is a child of this process, in a process group of its own."""

    def __init__(
        self,
        role: Role,
        job: Path,
        log: Path,
        threads: int | None,
        allowed: Allowed = UNLIMITED,
        start: StartProcess = start_process,
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log, self.allowed = log, allowed
        self.stopped = False
        self._received = b""
        self._ending = threading.Lock()
        self.limit: str | None = None  # that it hit
        self.most_bytes: int | None = None  # of memory, as far as it was seen
        self.worked = 0.0  # seconds in which an answer was waited for
        self._looked = time.monotonic()
        self._own_peak, self._oom_kills = peak_bytes(), oom_kills()
        self.log_start = log.stat().st_size if log.exists() else 0
        scratch = scratch_of(log.absolute())
        scratch.mkdir(exist_ok=True, mode=0o700)
        with log.open("ab") as output:
            environment = worker_environment(threads, scratch)
            environment["GATESKIP_PARENT"] = str(os.getpid())
            self.process = start(role, job, environment, output)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send it a command; if it is dead, `receive` reports that."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")

    def receive(self) -> Message:
        """The worker's next message; WorkerLost when it ended, or was stopped, without one."""
        while b"\n" not in self._received:
            started = time.monotonic()
            whole = self._read()
            self.worked += time.monotonic() - started
            if not whole:
                raise self._how_it_ended()
        line, _, self._received = self._received.partition(b"\n")
        message: Message = json.loads(line)
        return message

    def _read(self) -> bool:
        """Read from the worker's pipe; False when it is dead and everything was read, or when it
        exceeds a limit.

        A closed pipe is not a sure sign: children that the worker forked may hold it open.
        """
        assert self.process.stdout is not None
        began = time.monotonic()
        try:
            while not select.select([self.process.stdout], [], [], self._patience(began))[0]:
                if self._ended() or self._is_over(began):
                    return False
            if self._is_over(began):
                return False
            data = os.read(self.process.stdout.fileno(), 1 << 16)
        except (OSError, ValueError):  # another thread stopped the worker and closed the pipe
            return False
        self._received += data
        return bool(data)

    def _patience(self, began: float) -> float:
        """Seconds until the next check of the worker."""
        left = POLL_S
        if self.allowed.seconds is not None:
            left = self.allowed.seconds - self.worked - (time.monotonic() - began)
        return min(POLL_S, max(left, 0.0) + 0.01)

    def _is_over(self, began: float) -> bool:
        """Whether the worker has exceeded a limit. Its memory is noted on the way: after an
        out-of-memory kill it is unknown."""
        now, allowed = time.monotonic(), self.allowed
        if now - self._looked >= POLL_S:
            self._looked = now
            self._note(most_held_by(self.process.pid))
        if allowed.seconds is not None and self.worked + now - began > allowed.seconds:
            self.limit = f"{allowed.name}.seconds"
        elif allowed.memory is not None and (self.most_bytes or 0) > allowed.memory:
            self.limit = f"{allowed.name}.memory_mb"
        return self.limit is not None

    def _note(self, held: int | None) -> None:
        if held is not None:
            self.most_bytes = max(self.most_bytes or 0, held)

    def interrupt(self) -> None:
        """Send the worker SIGINT; its role decides how it responds."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGINT)  # not the group, to which its guard belongs

    def stop(self) -> None:
        """End the worker's whole process group, by SIGTERM and then by SIGKILL."""
        if self.stopped:
            return
        self.stopped = True
        if not self._exited(0.0):
            self._signal(signal.SIGTERM)
            self._exited(GRACE_S)
        self._signal(signal.SIGKILL)  # also whatever the worker itself had started
        self._reap()
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

    def _reap(self) -> int:
        """The worker's return code; also notes the peak memory that the kernel counted for it.

        The kernel's count begins with the memory of the process that forked; lower values are not
        the worker's own.
        """
        with self._ending:
            if self.process.returncode is None and hasattr(os, "wait4"):
                with contextlib.suppress(ChildProcessError):
                    _, status, usage = os.wait4(self.process.pid, 0)
                    self.process.returncode = os.waitstatus_to_exitcode(status)
                    unit = 1 if sys.platform == "darwin" else 1024
                    if (held := usage.ru_maxrss * unit) > self._own_peak:
                        self._note(held)
            return self.process.wait()

    def _how_it_ended(self) -> WorkerLost | StepError:
        if self.stopped:  # by us: that is no ending of its own
            return StepError("the worker was stopped")
        by_itself = self.limit is None and self._exited(GRACE_S)
        self.stop()
        code, worked = self._reap(), round(self.worked, 3)
        if by_itself:
            kills = (oom_kills() - self._oom_kills) or None
            ending = ending_of_code(
                code, seconds=worked, most_bytes=self.most_bytes, oom_kills=kills
            )
        else:  # then its last signal was ours
            ending = Ending(limit=self.limit, seconds=worked, most_bytes=self.most_bytes)
        return lost(ending, f"; its log {self.log.name} ends:\n{self._tail()}")

    def _tail(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            lines = file.read().decode("utf-8", "replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-LOG_TAIL_LINES:]) or "    (empty)"


def await_answer(worker: Worker, on_message: Callable[[Message], None] | None = None) -> Any:
    """The result in a worker's next answer; messages before it go to `on_message`.

    Raises:
        ComposeError: the worker's error, with its traceback as a note.
        WorkerLost: the worker ended.
    """
    while True:
        message = worker.receive()
        if "ok" not in message:
            if on_message is not None:
                on_message(message)
        elif message["ok"]:
            return message["result"]
        else:
            raise raised_by_worker(message)


def raised_by_worker(message: Message) -> ComposeError:
    """The exception in a worker's answer that is not ok."""
    kinds: dict[str, type[ComposeError]] = {
        error_type.__name__: error_type for error_type in (AssetError, ArtifactError, UserError)
    }
    error = kinds.get(message["kind"], StepError)(message["error"])
    error.add_note(message["traceback"])
    return error


@contextlib.contextmanager
def one_worker(job: Job) -> Iterator[LocalWorker]:
    """A worker on this machine, in a temporary folder, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="gateskip-") as folder:
        file = Path(folder) / "job.json"
        role = write_job(file, job)
        worker = LocalWorker(role, file, file.with_suffix(".log"), None)
        try:
            yield worker
        finally:
            worker.stop()


def ask_once(job: Job, on_message: Callable[[Message], None] | None = None) -> Any:
    """Run one worker on this machine, in a temporary folder, and return its result.

    Raises as `await_answer`.
    """
    with one_worker(job) as worker:
        return await_answer(worker, on_message)
