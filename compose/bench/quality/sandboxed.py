"""The child of `sandbox`: limits itself, then runs the program that it is given.

Standard input holds {"program", "word", limits}; the word is written to standard output when the
program has run to its end. It is started as a file, and imports nothing of this project.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from typing import Any

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
REFUSED = (
    *("socket.", "subprocess.", "ctypes.", "resource.", "shutil.", "tempfile.", "fcntl.", "pty."),
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "os.putenv"),
    *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.chflags", "os.utime", "os.setxattr", "os.removexattr"),
    "signal.pthread_kill",
)
"""Beginnings of audit events that are refused: network, processes, native code, changed files."""


def main() -> None:
    """Run the program of standard input."""
    order = json.load(sys.stdin)
    answer, word, program = os.dup(1), order["word"].encode(), order["program"]
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    leave_network()
    limit(order["cpu_s"], order["memory_bytes"], order["file_bytes"])
    sys.addaudithook(refuse)
    exec(compile(program, "program", "exec"), {"__name__": "program"})
    os.write(answer, word)
    os._exit(0)


def leave_network() -> None:
    """Move into a network of its own without a way out; where the kernel refuses, nothing
    changes."""
    ctypes.CDLL(None).unshare(CLONE_NEWUSER | CLONE_NEWNET)


def limit(cpu_s: int, memory_bytes: int, file_bytes: int) -> None:
    """Set the kernel's limits; processes above the first are refused to all users but root."""
    for kind, most in (
        (resource.RLIMIT_CPU, cpu_s),
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (most, most))


def refuse(event: str, given: tuple[Any, ...]) -> None:
    """Python's audit hook, which cannot be taken away again."""
    if event.startswith(REFUSED) or (event == "open" and int(given[2] or 0) & WRITING):
        raise PermissionError(f"{event} is refused")


if __name__ == "__main__":
    main()
