"""Disk and memory that a plan needs beyond what is free, by its own estimates.

Estimates are off by some percent, and memory that another program holds may come back. Only what is
missing by a clear margin is told here; what is short by less, a step finds when it begins.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from compose.capacity import free_memory
from compose.errors import ComposeError
from compose.numbers import bytes_text
from compose.outputs.run_folder import RunFolder
from compose.planning.plan import FOLDERS_HELD, PROCESS_BYTES, Cell, Plan, Step, folder_bytes
from compose.planning.prepare import model_shape
from compose.run.estimate import folder_size
from compose.run.state import Missing, Settings
from compose.run.steps import checkpoint_bytes

MARGIN = 0.75
"""Share of an estimate that has to be free."""
WRITES_ALL = ("prune", "heal", "quantize")
"""Roles of stages that write all weights; others link most of them from the folder before."""


def missing_room(
    plan: Plan,
    folder: RunFolder,
    settings: Settings,
    steps: list[Step],
    cells: list[Cell],
    *,
    local: bool,
) -> Iterator[Missing]:
    """What making these steps and measuring these cells lacks of disk, and of memory if `local`."""
    written = written_bytes(plan, settings, steps)
    place = folder.store.root
    free = shutil.disk_usage(_existing(place)).free
    if free < MARGIN * written:
        yield Missing(
            f"the steps write about {bytes_text(written)} to {place}, where {bytes_text(free)} are "
            "free",
            "free some space (`gateskip cache prune` removes folders that no run names), name "
            "another folder with --out, or measure fewer cells (--only)",
        )
    held = [(step.memory, f"step {plan.title(step)}") for step in steps if step.memory is not None]
    held += [
        (PROCESS_BYTES + FOLDERS_HELD * size, f"cell {cell.name}")
        for cell in cells
        if (size := folder_bytes(plan, cell, folder.store)) is not None
    ]
    free = free_memory() + psutil.swap_memory().free
    most, what = max(held, default=(0, ""))
    if local and free < MARGIN * most:
        yield Missing(
            f"{what} needs about {bytes_text(most)} of memory, and {bytes_text(free)} are free",
            "end other programs, take a smaller model, or leave out what needs most: "
            "`gateskip plan` shows the memory of each step",
        )


def written_bytes(plan: Plan, settings: Settings, steps: list[Step]) -> int:
    """The most bytes that these steps, in a row, take on the disk at one time; 0 where the sizes of
    the model are not known."""
    try:
        source = model_shape(plan.pipeline, settings.asset_cache) if steps else None
    except ComposeError:
        return 0
    shapes = plan.shapes(source)
    kept = most = 0
    for step in steps:
        shape, stage = shapes[step.key], step.stage
        if shape is None or stage is None or stage.role not in WRITES_ALL:
            continue
        kept += folder_size(plan, step, shape)
        most = max(most, kept + round(checkpoint_bytes(stage, shape.weights)))
    return most


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(place for place in (folder, *folder.parents) if place.exists())
