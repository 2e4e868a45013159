"""The worker's end of what it shares with its parent: the pipes, and its end.

Commands come in and messages go out as JSON lines. The worker ends with its parent, and so does
everything that it started.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import IO, Any

from compose.contract import Message
from compose.errors import ArtifactError, ComposeError, StepError
from compose.extras import missing_extra
from gateskip.errors import FormatError

PROGRESS_EVERY_S = 0.2


class Channel:
    """The worker's own copies of its pipes.

    Other code that reads stdin finds it empty; its output to stdout goes to stderr, the log.
    """

    def __init__(self) -> None:
        self._commands: IO[str] = os.fdopen(os.dup(0), "r", encoding="utf-8")
        self._messages: IO[str] = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.close(null)
        sys.stdout.flush()
        os.dup2(2, 1)
        self._reported = 0.0
        self._phase = ""

    def send(self, message: Message) -> None:
        """Send one message; nothing is raised where the parent has ended."""
        with contextlib.suppress(BrokenPipeError):
            self._messages.write(json.dumps(message, default=str) + "\n")
            self._messages.flush()

    def progress(
        self, done: int, total: int, phase: str, /, *, detail: str = "", **numbers: float
    ) -> None:
        """Report progress, at most every `PROGRESS_EVERY_S` but for a phase's first and last."""
        now = time.monotonic()
        begins, self._phase = phase != self._phase, phase
        if begins or done >= total or now - self._reported >= PROGRESS_EVERY_S:
            self._reported = now
            self.send({"progress": [done, total, phase, {"detail": detail, **numbers}]})

    def text(self, piece: str) -> None:
        """Send a piece of text that a model writes."""
        self.send({"text": piece})

    def receive(self) -> Iterator[Any]:
        """Commands of the worker's role, until the parent closes its end."""
        for line in self._commands:
            yield json.loads(line)


def answer(work: Callable[[], Any]) -> Message:
    """The result of `work`, or what it raised, as a message."""
    try:
        return {"ok": True, "result": work()}
    except Exception as error:
        traceback.print_exc()
        return failure_message(error)


def failure_message(error: Exception) -> Message:
    """An exception as a message: its text, its class in `compose.errors`, and its traceback.

    A library that is not installed is a UserError that names its extra; a file that the engine
    refuses is an ArtifactError.
    """
    missing = missing_extra(error) if isinstance(error, ModuleNotFoundError) else None
    shown = missing or error
    if isinstance(error, FormatError):  # the engine's word for it
        shown = ArtifactError(str(error))
    ours = isinstance(shown, ComposeError)
    text = str(shown) if ours else f"{type(shown).__name__}: {shown}"
    return {
        "ok": False,
        "error": text.strip(),
        "kind": type(shown).__name__ if ours else StepError.__name__,
        "traceback": "".join(traceback.format_exception(error)),
    }


PR_SET_PDEATHSIG = 1  # of prctl(2)


def die_with_parent(parent: int | None) -> None:
    """End this process, and everything that it starts, when its parent ends in any way.

    The kernel kills this process when its parent dies (Linux). A forked guard waits until stdin
    closes or this process is gone, and then kills the whole process group. `parent` is the process
    id of the expected parent: when that is dead already, this process ends at once.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)
    if os.getpgid(0) != os.getpid():
        return  # not the leader of its group: started by hand, so the group is not ours to kill
    watched, held = os.pipe()
    guard = os.fork()
    if guard == 0:
        os.close(held)
        _guard(watched)
    os.close(watched)
    atexit.register(_dismiss, guard)  # `held` stays open until this process ends


def _guard(watched: int) -> None:
    """All that the guard does: wait until stdin or `watched` hangs up, then kill the group."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.dup2(2, 1)  # the message pipe must close when the worker ends, not when the guard does
    waiting = select.poll()
    for end in (0, watched):
        waiting.register(end, select.POLLHUP)
    while not any(event & (select.POLLHUP | select.POLLERR) for _, event in waiting.poll()):
        pass
    os.killpg(0, signal.SIGKILL)


def _dismiss(guard: int) -> None:
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(guard, signal.SIGKILL)
        os.waitpid(guard, 0)
