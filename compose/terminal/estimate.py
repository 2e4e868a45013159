"""The table of `gateskip plan --estimate`."""

from __future__ import annotations

from rich.console import Group
from rich.text import Text

from compose.numbers import bytes_text, duration_text
from compose.run.estimate import Estimate, Estimates
from compose.table import Table, text_table
from compose.terminal.table import rich_table


def estimate_tables(estimates: Estimates) -> Group:
    """Steps and cells with time, memory and disk, and what all of them take."""
    totals = estimates.to_json()
    lines = [
        f"one after another: {duration_text(estimates.seconds)}, of it speed rounds "
        f"{duration_text(estimates.speed_seconds)} at least",
        f"at most {bytes_text(totals['peak_bytes'])} of memory; {bytes_text(totals['disk_bytes'])} "
        f"of model folders, and {bytes_text(totals['scratch_bytes'])} of checkpoints meanwhile",
    ]
    if estimates.unknown:
        names = ", ".join(estimates.unknown)
        lines.append(f"no time is known, for want of a record on this machine: {names}")
    steps = rich_table(_table(estimates.steps), "Steps")
    cells = rich_table(_table(estimates.cells), "Cells: loading, scoring")
    return Group(steps, "", cells, "", *(Text(line) for line in lines))


def _table(rows: tuple[Estimate, ...]) -> Table[None]:
    return text_table(
        ("", "time", "memory", "disk", "from"),
        [
            (
                row.name,
                "?" if row.seconds is None else duration_text(row.seconds),
                "?" if row.peak_bytes is None else bytes_text(row.peak_bytes),
                "" if row.disk_bytes is None else bytes_text(row.disk_bytes),
                f"scaled, {row.from_records} records" if row.basis == "scaled" else row.basis,
            )
            for row in rows
        ],
    )
