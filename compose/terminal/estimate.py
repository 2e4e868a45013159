"""The table of `gateskip plan --estimate`."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Group
from rich.text import Text

from compose.numbers import bytes_text, duration_text
from compose.run.estimate import Estimate, Estimates
from compose.table import Table, text_table
from compose.terminal.table import rich_table


def estimate_tables(estimates: Estimates) -> Group:
    """Steps and cells with time, memory and disk, and what all of them take."""
    speed = duration_text(estimates.speed_seconds)
    lines = [
        f"time: {_or_unknown(estimates.seconds, duration_text)} for all steps and cells, one after"
        f" another; measuring speed alone takes {speed} or more",
        f"memory: {_or_unknown(estimates.peak_bytes, bytes_text)} at most",
        f"disk: {_or_unknown(estimates.disk_bytes, bytes_text)} of model folders, and"
        f" {_or_unknown(estimates.scratch_bytes, bytes_text)} of checkpoints during training",
    ]
    if estimates.unknown:
        names = ", ".join(estimates.unknown)
        lines.append(f"this machine has no earlier record of: {names}")
    steps = rich_table(_table(estimates.steps), "Steps")
    cells = rich_table(_table(estimates.cells), "Cells (variants): loading and scoring")
    return Group(steps, "", cells, "", *(Text(line) for line in lines))


def _or_unknown(value: float | None, text: Callable[[float], str]) -> str:
    return "unknown" if value is None else text(value)


def _table(rows: tuple[Estimate, ...]) -> Table[None]:
    return text_table(
        ("", "time", "memory", "disk", "from"),
        [
            (
                row.name,
                _or_unknown(row.seconds, duration_text),
                _or_unknown(row.peak_bytes, bytes_text),
                "" if row.disk_bytes is None else bytes_text(row.disk_bytes),
                f"scaled, {row.from_records} records" if row.basis == "scaled" else row.basis,
            )
            for row in rows
        ],
    )
