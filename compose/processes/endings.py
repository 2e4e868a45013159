"""How a worker ended without an answer, and failures as data: why a step or cell was not finished.

The kernel reports the exit status or the signal, the peak memory of the process, and the number of
processes that it has killed for lack of memory. It does not report who sent a signal, so messages
name nobody.
"""

from __future__ import annotations

import contextlib
import signal
from dataclasses import asdict, dataclass
from typing import Any

from compose.errors import WorkerLost
from compose.numbers import bytes_text, duration_text
from compose.units import printable

REQUESTS = ("SIGTERM", "SIGINT", "SIGHUP")
"""Signals by which someone stops a process: they say nothing about the work."""
UNASKED = ("SIGKILL", *REQUESTS)
"""Signals from outside the process; other signals come from what the process did."""


@dataclass(frozen=True)
class Ending:
    """How a worker ended; a field is None where that is unknown, or did not happen."""

    exit_code: int | None = None
    signal: str | None = None
    """Name of the signal that ended it, as in `SIGKILL`."""
    limit: str | None = None
    """The limit of the pipeline file that it exceeded, as in `limits.cell.seconds`."""
    seconds: float | None = None
    """Seconds that it had worked."""
    most_bytes: int | None = None
    """Most memory that it was seen to use, in bytes."""
    oom_kills: int | None = None
    """Processes that the kernel killed for lack of memory while it ran; it may be one of them."""
    node: str | None = None
    """The node of a cluster on which it ran."""
    node_lost: bool = False
    """Whether the node, or the connection to it, was lost."""

    @property
    def lasting(self) -> bool:
        """Whether it would probably end in the same way again: the failure is stored until someone
        asks for a retry."""
        return not self.node_lost and self.signal not in REQUESTS

    @property
    def from_outside(self) -> bool:
        """Whether the cause was outside the worker: another attempt may succeed."""
        return self.limit is None and (self.node_lost or self.signal in UNASKED)

    def as_text(self) -> str:
        """How it ended, in one sentence without a subject."""
        if self.limit is not None:
            return self._limit_text()
        if self.node_lost:
            return "was lost with its node, or with the connection to it"
        if self.signal is None and self.exit_code is None:
            how = "closed its pipe without an answer and did not end"
        elif self.signal is None:
            how = f"ended with exit code {self.exit_code} without an answer"
        else:
            how = f"was killed by {self.signal} without an answer"
        return "; ".join([how, *self._seen()])

    def _limit_text(self) -> str:
        assert self.limit is not None
        if self.limit.endswith("seconds"):
            worked = duration_text(self.seconds or 0.0)
            return "; ".join([f"was stopped after {worked} of work by {self.limit}", *self._seen()])
        held = bytes_text(self.most_bytes or 0)
        return f"was stopped by {self.limit}: it used {held} of memory"

    def _seen(self) -> list[str]:
        seen = []
        if self.most_bytes is not None:
            seen.append(f"it used at most {bytes_text(self.most_bytes)} of memory")
        if self.oom_kills:
            seen.append(f"the kernel killed {self.oom_kills} process(es) for lack of memory")
        return seen


def lost(ending: Ending, log: str = "") -> WorkerLost:
    """The error of a worker that ended; `log` is the end of its output."""
    text = f"the worker {ending.as_text()}"
    fields = {k: v for k, v in asdict(ending).items() if v is not None and v is not False}
    return WorkerLost(f"{text}{log}", fields)


def ending_of(error: WorkerLost) -> Ending:
    """The ending that an error carries."""
    return Ending(**error.ending)


def ending_of_code(code: int, **details: Any) -> Ending:
    """An ending from the return code of a process, which is negative after a signal."""
    if code >= 0:
        return Ending(exit_code=code, **details)
    name = f"signal {-code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
    return Ending(signal=name, **details)


@dataclass(frozen=True)
class Failure:
    """Why a step or a cell was not finished."""

    reason: str
    """One sentence."""
    failed_in: str
    """The stage's name, or the phase of a cell: `load`, `quality`, `lossless`, `speed`."""
    traceback: str | None = None
    ending: dict[str, Any] | None = None
    """How its process ended without an answer, where it did: see `endings.Ending`."""


def failure_of(error: Exception, failed_in: str) -> Failure:
    """An exception as data. A worker's traceback is a note of the exception."""
    notes = getattr(error, "__notes__", [])
    text = printable("\n".join(notes) or str(error))
    ending = error.ending if isinstance(error, WorkerLost) else None
    return Failure(first_line(error), failed_in, text, ending)


def is_lasting(error: Exception) -> bool:
    """Whether an exception would probably come again, at the same cost: a crash, or an exceeded
    limit.

    Errors that a worker raised are not: the user may free the disk or install the library, and
    another attempt costs little.
    """
    return isinstance(error, WorkerLost) and ending_of(error).lasting


def first_line(error: Exception) -> str:
    """The first line of an exception's message, or its type where the message is empty."""
    lines = printable(str(error)).strip().splitlines() or [type(error).__name__]
    return lines[0]
