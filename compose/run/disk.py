"""How much disk a step is about to need, and the refusal where it is not there.

A step that runs out of space in its last minute has cost all minutes before. The estimate is of
what the step writes: its model folder, and the checkpoint of a training.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from compose.errors import ComposeError, StepError
from compose.numbers import bytes_text
from compose.planning.plan import Step
from compose.planning.prepare import model_shape
from compose.run.state import RunState
from compose.stages.base import Stage
from gateskip.training.recipe import WHOLE

SPARE_BYTES = 64_000_000
"""What else is written meanwhile: logs, logits of the probe text, records."""
CHECKPOINT = 24
"""Bytes a trained weight in a checkpoint: it and Adam's two moments in float32, old beside new."""
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of a weight in each type that a pipeline may name."""


def needed_bytes(run: RunState, step: Step) -> int:
    """About how many bytes a step writes; 0 where nothing is known of its source."""
    width = WIDTHS[run.plan.pipeline.model.dtype]
    if step.parent is None:
        try:
            shape = model_shape(run.plan.pipeline, run.settings.asset_cache)
        except ComposeError:
            return 0
        return 0 if shape is None else shape.weights * width
    manifest = run.store.manifest(step.parent) or {}
    parent: int = sum(manifest.get("files", {}).values())
    assert step.stage is not None, "only the source has no stage"
    written = parent * share_written(step.stage)
    return round(written + checkpoint_bytes(step.stage, parent / width))


def share_written(stage: Stage) -> float:
    """Size of the folder that a stage writes, over that of the folder it starts from, at most."""
    return 0.6 if stage.role == "quantize" else 1.0


def checkpoint_bytes(stage: Stage | None, weights: float) -> float:
    """Bytes of the checkpoints of a stage that trains all of so many weights, or their codes; 0 for
    any other stage."""
    trains_all = getattr(stage, "steps", 0) and getattr(stage, "backbone", None) in WHOLE
    return CHECKPOINT * weights if trains_all else 0.0


def require_space(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what would not fit on the disk of `folder`.

    Raises:
        StepError: fewer than `needed` bytes, and some to spare, are free.
    """
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed and free < needed + SPARE_BYTES:
        raise StepError(
            f"{what} writes about {bytes_text(needed)} to {folder}, where {bytes_text(free)} are "
            "free",
            fix="free some space (`gateskip cache prune` removes folders that no run names), or "
            "name another folder with --out",
        )
