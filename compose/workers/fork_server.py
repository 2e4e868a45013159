"""A process that has imported the libraries of steps and cells, and forks workers.

`compose.processes.fork_server` starts it, and sends a message for each worker over the socket on
stdin, with the descriptors of the worker's stdin, stdout and log. The answer is the process id.
The process ends with its socket. It has one thread, because a fork copies no other.
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from compose.capacity import THREADS
from compose.extras import leave_out_torchao
from compose.workers.main import main

MOST_BYTES = 1 << 17
"""Of a message; the environment is its longest part."""

ADOPTION_S = 10.0
"""Seconds that a worker waits for the process that asked for it to become its parent."""


def import_libraries() -> None:
    """Import what steps and cells need of most models. Nothing here starts a thread or a device."""
    leave_out_torchao()
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    from compose.artifacts import intake  # noqa: F401
    from compose.bench import cell  # noqa: F401
    from gateskip.kernels import autotune  # noqa: F401
    from gateskip.quantization import hf_quantizer  # noqa: F401
    from gateskip.training import loop  # noqa: F401


def serve(asked: socket.socket) -> None:
    """Fork a worker for each message, until the other end of the socket closes."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(asked, MOST_BYTES, 3)
        if not message:
            return
        worker = fork_orphan()
        if worker is None:
            asked.close()
            sys.exit(run_worker(json.loads(message), descriptors))
        for descriptor in descriptors:
            os.close(descriptor)
        asked.send(str(worker).encode())


def fork_orphan() -> int | None:
    """Fork a process whose parent ends at once, so that the process which adopts orphans gets it.
    Its id; None in that process."""
    read, write = os.pipe()
    middle = os.fork()
    if middle == 0:
        orphan = os.fork()
        if orphan != 0:
            os.write(write, str(orphan).encode())
            os._exit(0)
        os.close(read)
        os.close(write)
        return None
    os.close(write)
    with open(read, "rb") as told:
        orphan = int(told.read())
    os.waitpid(middle, 0)
    return orphan


def run_worker(job: dict[str, Any], descriptors: Sequence[int]) -> int:
    """Become the worker that `job` describes, and do its work; the exit code."""
    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    tempfile.tempdir = None  # another TMPDIR
    set_threads(os.environ.get(THREADS))
    end = time.monotonic() + ADOPTION_S
    while os.getppid() != int(os.environ["GATESKIP_PARENT"]) and time.monotonic() < end:
        time.sleep(0.001)
    return main(job["role"], job["file"])


def set_threads(threads: str | None) -> None:
    """What the variable does in a process that imports torch after it is set."""
    import torch

    if threads is not None and threads.isdigit():
        torch.set_num_threads(int(threads))


def run() -> None:
    """Import, then serve the socket on stdin."""
    import_libraries()
    if len(os.listdir("/proc/self/task")) > 1:
        sys.exit("an import has started a thread: no fork is safe")
    gc.freeze()  # pages that the collector does not write to stay shared
    serve(socket.socket(fileno=0))


if __name__ == "__main__":
    run()
