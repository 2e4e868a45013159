"""Workers that are forked from a process which has imported their libraries.

To import torch and transformers takes 4 to 5 s of processor time, more than most of what a short
step or cell does. On Linux a run pays for it once: it starts `compose.workers.fork_server`, which
forks each worker. The worker becomes a child of this process, as if started by it: this process is
the one that adopts orphans while the fork server forks one.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from compose.contract import Role
from compose.processes.worker_process import Process, start_process, worker_environment

PR_SET_CHILD_SUBREAPER = 36  # of prctl(2)

SERVER = [sys.executable, "-P", "-m", "compose.workers.fork_server"]


class ForkedProcess:
    """A forked worker: as much of `subprocess.Popen` as a worker's owner uses."""

    def __init__(self, pid: int, stdin: IO[bytes], stdout: IO[bytes]) -> None:
        self.pid = pid
        self.stdin: IO[bytes] | None = stdin
        self.stdout: IO[bytes] | None = stdout
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The return code; None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """Wait for its end; its return code, 0 where another thread has waited for it."""
        return self._wait(0) or 0

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            with contextlib.suppress(ChildProcessError):
                pid, status = os.waitpid(self.pid, options)
                if pid != 0:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


class ForkServer:
    """Starts workers as `start_process` does, and sooner. Linux only."""

    def __init__(self) -> None:
        self._one_at_a_time = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(
        self, role: Role, job: Path, environment: Mapping[str, str], output: IO[bytes]
    ) -> Process:
        """Fork a worker on a job file; where the server has ended, start it by `start_process`."""
        with self._one_at_a_time:
            if self._server is None:
                self._begin()
            forked = self._fork(role, job, environment, output)
        return forked or start_process(role, job, environment, output)

    def close(self) -> None:
        """End the server; its workers go on."""
        with self._one_at_a_time:
            if self._server is not None and self._socket is not None:
                self._socket.close()
                self._server.kill()  # it may be importing
                self._server.wait()

    def _begin(self) -> None:
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                SERVER,
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # numpy's threads would begin at its import; a worker sets the number of torch's.
                env=worker_environment(None) | {"OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,
            )

    def _fork(
        self, role: Role, job: Path, environment: Mapping[str, str], output: IO[bytes]
    ) -> ForkedProcess | None:
        asked = {
            "role": role,
            "file": str(job),
            "environment": dict(environment),
            "folder": os.getcwd(),
        }
        commands, stdin = os.pipe()
        stdout, messages = os.pipe()
        assert self._socket is not None
        pid = 0
        try:
            with adopting_orphans():
                ends = [commands, messages, output.fileno()]
                socket.send_fds(self._socket, [json.dumps(asked).encode()], ends)
                pid = int(self._socket.recv(64) or 0)
        except OSError:
            pass  # the server was killed, or no orphan can be adopted
        finally:
            os.close(commands)
            os.close(messages)
            if pid == 0:
                os.close(stdin)
                os.close(stdout)
        if pid == 0:
            return None
        return ForkedProcess(pid, open(stdin, "wb", buffering=0), open(stdout, "rb", buffering=0))


@contextlib.contextmanager
def adopting_orphans() -> Iterator[None]:
    """Within, a process whose parent ends becomes a child of this one, not of the first process.

    Raises:
        OSError: the kernel does not offer it.
    """
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_CHILD_SUBREAPER, 1) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")
    try:
        yield
    finally:
        prctl(PR_SET_CHILD_SUBREAPER, 0)
