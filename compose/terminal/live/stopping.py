"""Ctrl-C and SIGTERM: both end a run in order, and say how it goes on."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from compose.units import printable

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM has come: a queue's time is over, or the machine goes down."""


@contextmanager
def orderly_stop() -> Iterator[None]:
    """Within this context Ctrl-C and SIGTERM end the work in order; further ones change nothing.

    Ending takes seconds (workers are asked, and then killed), and a second Ctrl-C in between would
    leave what was not yet put away. Once one has come the program ends, so they stay without effect
    when the context is left.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can take signals
        return
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is to be ignored
        numbers.append(signal.SIGINT)

    def stop(number: int, _: object) -> None:
        before.update(dict.fromkeys(numbers, signal.SIG_IGN))  # holds to the interpreter's own end
        for stop_signal in numbers:
            signal.signal(stop_signal, _nothing)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    before: dict[signal.Signals, Any] = {
        stop_signal: signal.getsignal(stop_signal) for stop_signal in numbers
    }
    for stop_signal in numbers:
        signal.signal(stop_signal, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _nothing(*_: object) -> None:
    """A handler and not SIG_IGN, which programs that are started meanwhile would inherit."""


def exit_code(stop: KeyboardInterrupt) -> int:
    """What a shell gives for a program that the signal ended: 130 for Ctrl-C, 143 for SIGTERM."""
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED


def resuming_command() -> str:
    """The command line that goes on where this one was stopped."""
    return printable(shlex.join(["gateskip", *sys.argv[1:]]))
