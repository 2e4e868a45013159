"""The end of a worker: it ends with its parent, and so does everything that it started."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import select
import signal
import sys

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
