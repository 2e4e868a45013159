"""The job of a cell that is measured in no test: its worker imports nothing heavy and waits."""

from __future__ import annotations

from pathlib import Path

from compose.contract import CellJob, write_job


def write_idle_job(file: Path) -> None:
    """Write the job file of such a cell, `dense`."""
    folder = file.parent
    job = CellJob(
        name="dense",
        folder=folder,
        baseline_folder=folder,
        decode=None,
        benchmark={},
        seed=0,
        dtype="float32",
        asset_cache=folder,
        reference=folder / "reference",
        threads=None,
    )
    write_job(file, job)
