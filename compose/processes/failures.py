"""Failures as data: why a step or a cell could not be finished."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from compose.errors import WorkerLost
from compose.processes.endings import ending_of
from compose.units import printable


@dataclass(frozen=True)
class Failure:
    """Why a step or a cell could not be finished."""

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
    told = printable("\n".join(notes) or str(error))
    ending = error.ending if isinstance(error, WorkerLost) else None
    return Failure(first_line(error), failed_in, told, ending)


def is_lasting(error: Exception) -> bool:
    """Whether an exception is likely to come again, at the same cost: a crash, or a limit hit.

    What a worker raised is not: a full disk or a missing library may be put right, and it costs
    little to ask.
    """
    return isinstance(error, WorkerLost) and ending_of(error).lasting


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    lines = printable(str(error)).strip().splitlines() or [type(error).__name__]
    return lines[0]
