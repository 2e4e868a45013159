"""Failures as data: why a step or a cell could not be finished."""

from __future__ import annotations

from dataclasses import dataclass

from compose.units import printable


@dataclass(frozen=True)
class Failure:
    """Why a step or a cell could not be finished."""

    reason: str
    """One sentence."""
    failed_in: str
    """The stage's name, or the phase of a cell: `load`, `quality`, `lossless`, `speed`."""
    traceback: str | None = None


def failure_of(error: Exception, failed_in: str) -> Failure:
    """An exception as data. A worker's traceback is a note of the exception."""
    notes = getattr(error, "__notes__", [])
    return Failure(first_line(error), failed_in, printable("\n".join(notes) or str(error)))


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    lines = printable(str(error)).strip().splitlines() or [type(error).__name__]
    return lines[0]
