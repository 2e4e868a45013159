"""Steps: each model folder is made in one process, loaded again in another, and then stored.

A step that runs out of disk in its last minute has cost all minutes before, so what it writes is
estimated first: its model folder, and the checkpoint of a training.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import Timeout

from compose.contract import CheckJob, StepJob
from compose.errors import AssetError, ComposeError, StepError
from compose.numbers import bytes_text
from compose.planning.plan import Cell, Plan, Step, step_needs
from compose.planning.prepare import model_shape
from compose.processes.endings import first_line
from compose.results.record import only_finite
from compose.run.failures import attempted, pass_over_step, step_failed
from compose.run.state import Line, RunState, Task
from compose.stages.base import Stage
from gateskip.training.recipe import WHOLE

LOCK_PATIENCE_S = 0.2
"""How long a lock may take before the board shows that another run holds it."""


def needed_steps(plan: Plan, cells: list[Cell]) -> list[Step]:
    """The steps that make the cells' model folders, in the plan's order."""
    to_build = [cell for cell in cells if cell.folder is None]
    needed = {step.key for cell in to_build for step in plan.lineage(cell.weights)}
    return [step for step in plan.steps if step.key in needed]


def step_tasks(run: RunState, cells: list[Cell]) -> list[Task]:
    """A task for every model folder that the cells need; the source is also the teacher."""
    return [
        Task(
            step.key,
            partial(make_step, run, step),
            () if step.parent is None else (step.parent,),
        )
        for step in needed_steps(run.plan, cells)
    ]


def make_step(run: RunState, step: Step) -> None:
    """Make a step's folder, unless it is stored whole or its parent could not be made.

    Raises:
        AssetError: the source model is not available, so nothing can run.
    """
    if step.parent in run.failed_steps:
        run.failed_steps[step.key] = run.failed_steps[step.parent]
        return
    if _is_whole(run, step):
        _send(run, step)
        return
    if pass_over_step(run, step):
        return
    line = run.board.line(_title(run, step), step=run.plan.title(step))
    try:
        with _locked(run, step.key, line):
            damage = run.store.damage(step.key)
            if damage is None and run.store.has(step.key):  # made while we waited
                line.done("made by another run")
                return
            run.worked = True
            require_space(run.store.root, needed_bytes(run, step), run.plan.title(step))
            if _fetched(run, step, line):
                line.done("from the mirror")
                return
            attempted(run, run.plan.title(step), line, partial(_write, run, step, line))
    except (ComposeError, OSError) as error:  # a full disk, or a store that is not ours to write
        line.failed(first_line(error))
        if isinstance(error, AssetError) and step.stage is None:
            raise
        step_failed(run, step, error)
    else:
        line.done()
        _send(run, step)


def _fetched(run: RunState, step: Step, line: Line) -> bool:
    """Whether the mirror had the step; where it cannot be read, that is said, and the step made."""
    if run.settings.mirror is None:
        return False
    line.update(0, 1, "asking the mirror")
    try:
        return run.settings.mirror.fetch(step.key, run.store)
    except StepError as error:
        run.board.print(f"! {run.plan.title(step)} is made here: {first_line(error)}")
        return False


def _send(run: RunState, step: Step) -> None:
    """Have the step at the mirror, too; where that fails, it is said, and the run goes on."""
    if run.settings.mirror is None:
        return
    try:
        if run.settings.mirror.send(step.key, run.store):
            run.board.print(f"{run.plan.title(step)} is at the mirror")
    except StepError as error:
        run.board.print(f"! {run.plan.title(step)} is not at the mirror: {first_line(error)}")


def _is_whole(run: RunState, step: Step) -> bool:
    """Whether a step is stored just as it was made; that it is damaged is said."""
    damage = run.store.damage(step.key)
    if damage is not None:
        where = f"store/{step.key}"
        run.board.print(f"! {run.plan.title(step)} is made again, {where} is damaged: {damage}")
    return damage is None and run.store.has(step.key)


def _title(run: RunState, step: Step) -> str:
    of = f" {run.plan.pipeline.model.source}" if step.stage is None else ""
    return run.plan.title(step) + of


@contextmanager
def _locked(run: RunState, key: str, line: Line) -> Iterator[None]:
    """Hold the step's lock; the line shows when another run holds it."""
    try:
        with run.store.locked(key, timeout=LOCK_PATIENCE_S):
            yield
    except Timeout:
        line.update(0, 1, "waiting: another run is making it")
        with run.store.locked(key):
            yield


def _write(run: RunState, step: Step, line: Line) -> None:
    record: dict[str, Any] = {}
    name = "-".join(("step", *(step.chain or ("source",)), step.key))
    with run.store.write(step.key, record) as entry:
        check = entry / "check.safetensors"
        needs = step_needs(run.plan, step)
        job = step_job(run, step, entry / "model", check)
        record |= only_finite(run.workers.call(name, job, line, needs))
        line.update(1, 1, "loading it again")
        again = CheckJob(entry / "model", check)
        checked = run.workers.call(name, again, line, replace(needs, gpu=False))
        record["reload"] = only_finite(checked)


def step_job(run: RunState, step: Step, target: Path, check: Path) -> StepJob:
    """What a process has to know to make a step's folder."""
    pipeline, store = run.plan.pipeline, run.store
    tensorboard = run.folder.tensorboard(run.plan.title(step)) if run.settings.tensorboard else None
    return StepJob(
        key=step.key,
        name=step.name,
        stage=None if step.stage is None else step.stage.model_dump(mode="json"),
        model=pipeline.model.source,
        keep_blocks=pipeline.model.keep_blocks,
        dtype=pipeline.model.dtype,
        seed=step.seed,
        train=pipeline.data.train,
        calibration=pipeline.data.calibration,
        source=store.model(step.parent or step.key),
        dense=store.model(run.plan.steps[0].key),
        target=target,
        check=check,
        work=store.work(step.key),
        asset_cache=run.settings.asset_cache.absolute(),
        tensorboard=tensorboard,
        device=pipeline.model.device,
    )


SPARE_BYTES = 64_000_000
"""What else is written meanwhile: logs, logits of the probe text, records."""
CHECKPOINT = 24
"""Bytes a trained weight in a checkpoint: it and Adam's two moments in float32, old beside new."""
MOST_BITS = 8
"""Of a rounded weight in a checkpoint."""
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
    """Bytes of the checkpoints of a stage that rounds so many weights layer by layer, or trains all
    of them or their codes; 0 for any other stage."""
    if stage is not None and hasattr(stage, "compensate") and getattr(stage, "calibrate", True):
        return min(stage.most_bits(), MOST_BITS) / 8 * weights
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
