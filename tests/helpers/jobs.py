"""Jobs of cells, as tests measure them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compose.contract import CellJob, write_job


def cell_job(folder: Path, scratch: Path, **given: Any) -> CellJob:
    """A cell of a model folder, in float32 and its own baseline unless `given` says otherwise; what
    it writes is below `scratch`."""
    usual: dict[str, Any] = {
        "name": "cell",
        "folder": folder,
        "baseline_folder": folder,
        "decode": None,
        "benchmark": {},
        "seed": 0,
        "dtype": "float32",
        "asset_cache": scratch / "cache",
        "reference": scratch / "reference",
        "threads": None,
    }
    return CellJob(**usual | given)


def write_idle_job(file: Path) -> None:
    """Write the job file of a cell that is measured in no test, `dense`: its worker imports nothing
    heavy and waits."""
    folder = file.parent
    write_job(file, cell_job(folder, folder, name="dense", asset_cache=folder))
