"""The table of `gateskip plan --estimate`."""

from __future__ import annotations

from rich.console import Group
from rich.table import Table
from rich.text import Text

from compose.run.estimate import Estimate, Estimates
from compose.terminal.shown import shown
from compose.units import bytes_text, duration_text


def estimate_tables(found: Estimates) -> Group:
    """Steps and cells with time, memory and disk, and what all of them take."""
    told = found.to_json()
    lines = [
        f"one after another: {duration_text(found.seconds)}, of it speed rounds "
        f"{duration_text(found.speed_seconds)} at least",
        f"at most {bytes_text(told['peak_bytes'])} of memory; {bytes_text(told['disk_bytes'])} of "
        f"model folders, and {bytes_text(told['scratch_bytes'])} of checkpoints meanwhile",
    ]
    if found.unknown:
        names = ", ".join(found.unknown)
        lines.append(f"no time is known, for want of a record on this machine: {names}")
    steps, cells = _table("Steps", found.steps), _table("Cells: loading, scoring", found.cells)
    return Group(steps, "", cells, "", *(Text(line) for line in lines))


def _table(title: str, rows: tuple[Estimate, ...]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for column in ("", "time", "memory", "disk", "from"):
        table.add_column(column, overflow="fold", header_style="dim")
    for row in rows:
        basis = f"{row.basis}, {row.from_records} records" if row.basis == "scaled" else row.basis
        table.add_row(
            shown(row.name),
            "?" if row.seconds is None else duration_text(row.seconds),
            "?" if row.peak_bytes is None else bytes_text(row.peak_bytes),
            "" if row.disk_bytes is None else bytes_text(row.disk_bytes),
            basis,
        )
    return table
