"""Runs a program that a model wrote in a child process with limits, and tells whether it passed.

`sandboxed.py` is the child. It sets the kernel's limits (processor time, memory, sizes of files),
leaves the network where the kernel allows it, and refuses sockets, processes and changes of files
in Python before the program starts. That stops accidents. It is no prison for code that is written
to break out: Python's own refusal ends where native code begins, and files can be read.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from compose.errors import UserError

CPU_S = 5
WALL_S = 20.0
"""For programs that sleep; wider than the processor's time, so that a busy machine fails nobody."""
MEMORY_BYTES = 1 << 30
FILE_BYTES = 4096
"""Of the child's one file, which the parent reads."""
CHILD = Path(__file__).with_name("sandboxed.py")


def require_limits() -> None:
    """Raises UserError on a system whose kernel does not enforce the limits."""
    if sys.platform != "linux":
        raise UserError(
            "code that a model writes is run only on Linux, where memory and files are limited",
            fix="leave out the task humaneval",
        )


def passes(program: str) -> bool:
    """Whether a program runs to its end. What it prints is thrown away; leaving early, as by
    `sys.exit(0)`, is a failure.

    Raises:
        UserError: this system has no limits to run it under.
    """
    require_limits()
    word = secrets.token_hex(16)
    limits = {"cpu_s": CPU_S, "memory_bytes": MEMORY_BYTES, "file_bytes": FILE_BYTES}
    order = json.dumps({"program": program, "word": word, **limits})
    command = [sys.executable, "-s", "-S", "-P", "-B", "-X", "utf8", str(CHILD)]
    with (
        tempfile.TemporaryDirectory(prefix="gateskip-code-") as folder,
        tempfile.TemporaryFile() as answer,
    ):
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PYTHONHASHSEED": "0"},  # nothing of ours, and one order of sets
            start_new_session=True,
        )
        try:
            child.communicate(order.encode(), WALL_S)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(child)
        answer.seek(0)
        return answer.read() == word.encode()


def _end(child: subprocess.Popen[bytes]) -> None:
    """End the child and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
