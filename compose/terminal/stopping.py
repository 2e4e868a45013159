"""Ctrl-C and SIGTERM: both end a run in order, and say how it goes on."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from compose.units import printable

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM has come: a queue's time is over, or the machine goes down."""


@contextmanager
def orderly_stop() -> Iterator[None]:
    """Within this context SIGTERM ends the work as Ctrl-C does; a second one changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can take signals
        return

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code(stop: KeyboardInterrupt) -> int:
    """What a shell gives for a program that the signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def resuming_command() -> str:
    """The command line that goes on where this one was stopped."""
    return printable(shlex.join(["gateskip", *sys.argv[1:]]))
