"""A worker process and what is exchanged with it: start, commands, answers, end.

A worker is `python -m compose.workers.main ROLE JOB.json`. It reads commands as JSON lines on
stdin and answers as JSON lines on stdout (`messages`); all else that it or a library prints goes to
its log file.
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
from typing import Any, Protocol

import psutil

from compose.errors import ArtifactError, AssetError, ComposeError, StepError, UserError
from compose.execution.messages import Message, Role
from compose.store import write_json
from compose.units import bytes_text

LOG_TAIL_LINES = 25
GRACE_S = 5.0
"""How long a worker that was asked to stop may take before it is killed."""

POLL_S = 1.0
"""How often a silent worker is checked for its end."""

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
            StepError: the worker died; the message has how, and the end of its log.
        """

    def stop(self) -> None:
        """End it and everything it started; a second call does nothing."""


def worker_environment(threads: int | None) -> dict[str, str]:
    """The environment of a worker: this one's, with the thread count and the path of this code."""
    environment = dict(os.environ)
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
    """A worker's command line; -P keeps a folder `compose` in the working directory out."""
    return [sys.executable, "-P", "-m", "compose.workers.main", role, str(job)]


class LocalWorker:
    """A worker that is a child of this process, in a process group of its own."""

    def __init__(self, role: Role, job: Path, log: Path, threads: int | None) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        self.log = log
        self.stopped = False
        self._received = b""
        self.most_bytes = 0  # of memory, as far as it was seen
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

    def send(self, message: Mapping[str, Any]) -> None:
        """Send it a command; that it is dead shows in `receive`."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.process.stdin.write(json.dumps(message).encode() + b"\n")

    def receive(self) -> Message:
        """The worker's next message; StepError when it died without one."""
        while b"\n" not in self._received:
            if not self._read():
                raise StepError(self._how_it_ended())
        line, _, self._received = self._received.partition(b"\n")
        message: Message = json.loads(line)
        return message

    def _read(self) -> bool:
        """Read from the worker's pipe; False when it is dead and everything was read.

        A closed pipe is no sure sign: children that the worker forked may hold it open.
        """
        assert self.process.stdout is not None
        try:
            while not select.select([self.process.stdout], [], [], POLL_S)[0]:
                if self._ended():
                    return False
                self._look()
            data = os.read(self.process.stdout.fileno(), 1 << 16)
        except (OSError, ValueError):  # another thread stopped the worker and closed the pipe
            return False
        self._received += data
        return bool(data)

    def _look(self) -> None:
        """Note how much memory the worker holds: after an out-of-memory kill nobody knows."""
        with contextlib.suppress(psutil.Error):
            held = psutil.Process(self.process.pid).memory_info().rss
            self.most_bytes = max(self.most_bytes, held)

    def stop(self) -> None:
        """End the worker's whole process group, by SIGTERM and then by SIGKILL."""
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

    def _how_it_ended(self) -> str:
        self._exited(GRACE_S)
        self.stop()
        code = self.process.wait()
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            if -code == signal.SIGKILL:
                seen = f"; it held {bytes_text(self.most_bytes)}" if self.most_bytes else ""
                how += f" (out of memory is the usual reason{seen})"
        else:
            how = f"ended with exit code {code}"
        return f"the worker {how} without an answer; its log {self.log.name} ends:\n{self._tail()}"

    def _tail(self) -> str:
        with self.log.open("rb") as file:
            file.seek(self.log_start)
            lines = file.read().decode("utf-8", "replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-LOG_TAIL_LINES:]) or "    (empty)"


def await_answer(worker: Worker, on_message: Callable[[Message], None] | None = None) -> Any:
    """The result in a worker's next answer; other messages before it go to `on_message`.

    Raises:
        ComposeError: what the worker raised, with its traceback as a note.
        StepError: the worker died.
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
        each.__name__: each for each in (AssetError, ArtifactError, UserError)
    }
    error = kinds.get(message["kind"], StepError)(message["error"])
    error.add_note(message["traceback"])
    return error


def ask_once(
    role: Role, job: Mapping[str, Any], on_message: Callable[[Message], None] | None = None
) -> Any:
    """Run one worker on this machine, in a temporary folder, and return its result.

    Raises as `await_answer`.
    """
    with tempfile.TemporaryDirectory(prefix="gateskip-") as folder:
        file = Path(folder) / f"{role}.json"
        write_json(file, job)
        worker = LocalWorker(role, file, file.with_suffix(".log"), None)
        try:
            return await_answer(worker, on_message)
        finally:
            worker.stop()
