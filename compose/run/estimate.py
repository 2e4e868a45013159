"""What a plan will take: time, memory and disk of each step and cell, from measured costs.

    measured   the step itself is stored on this machine
    scaled     costs of stages of the same kind on this machine, at other sizes: seconds by a line
               through them, or by their ratio where all have one size; `from_records` says how many
    shape      no such record: memory and disk from the model's sizes alone, no time

Nothing is invented: where there is no record there is no time, and then there is no total either.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from compose.outputs.run_folder import RunFolder
from compose.planning.plan import FOLDERS_HELD, PROCESS_BYTES, Plan, Step, speculates
from compose.run.costs import (
    Cost,
    cell_costs,
    cell_passes,
    kind_of_cell,
    kind_of_step,
    step_costs,
    step_passes,
)
from compose.run.steps import WIDTHS, checkpoint_bytes, share_written
from compose.stages.base import ModelShape, Stage

Basis = Literal["measured", "scaled", "shape"]


@dataclass(frozen=True)
class Estimate:
    """What one step or cell is expected to take; None where nothing is known."""

    name: str
    seconds: float | None
    peak_bytes: int | None
    disk_bytes: int | None
    """That stays: the model folder. Of a cell none."""
    scratch_bytes: int
    """That it takes while it works, beside that: the checkpoints of a training."""
    basis: Basis
    from_records: int = 0
    """Records that the seconds are scaled from."""


@dataclass(frozen=True)
class Estimates:
    """The estimates of a plan."""

    steps: tuple[Estimate, ...]
    cells: tuple[Estimate, ...]
    speed_seconds: float
    """What the timed rounds take at least, from the file's own settings."""

    @property
    def seconds(self) -> float | None:
        """All seconds, one after another; None where those of any step or cell are unknown."""
        return None if self.unknown else self.known_seconds

    @property
    def known_seconds(self) -> float:
        """The seconds that are known, one after another."""
        times = (row.seconds for row in (*self.steps, *self.cells))
        return sum(seconds for seconds in times if seconds is not None) + self.speed_seconds

    @property
    def peak_bytes(self) -> int | None:
        """Memory of the largest step or cell; None where that of any is unknown."""
        peaks = [row.peak_bytes for row in (*self.steps, *self.cells)]
        known = [peak for peak in peaks if peak is not None]
        return max(known, default=0) if len(known) == len(peaks) else None

    @property
    def disk_bytes(self) -> int | None:
        """All model folders; None where the size of any is unknown."""
        sizes = [step.disk_bytes for step in self.steps]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    @property
    def scratch_bytes(self) -> int | None:
        """The largest checkpoints of a training; None where a step's model is unknown."""
        unknown = self.disk_bytes is None
        return None if unknown else max((step.scratch_bytes for step in self.steps), default=0)

    @property
    def unknown(self) -> list[str]:
        """Names of steps and cells without a time."""
        return [row.name for row in (*self.steps, *self.cells) if row.seconds is None]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON, with the sums; null is unknown."""
        return {
            "steps": [asdict(step) for step in self.steps],
            "cells": [asdict(cell) for cell in self.cells],
            "speed_seconds": self.speed_seconds,
            "seconds": None if self.seconds is None else round(self.seconds, 1),
            "known_seconds": round(self.known_seconds, 1),
            "without_seconds": self.unknown,
            "peak_bytes": self.peak_bytes,
            "disk_bytes": self.disk_bytes,
            "scratch_bytes": self.scratch_bytes,
        }


def estimate(plan: Plan, run: RunFolder, shape: ModelShape | None) -> Estimates:
    """What a plan takes, on a source model of `shape`, from the records beside `run`."""
    measured = list(step_costs(run.store))
    shapes = plan.shapes(shape)
    steps = tuple(_step(plan, run, step, shapes[step.key], measured) for step in plan.steps)
    sizes = {step.key: row.disk_bytes for step, row in zip(plan.steps, steps, strict=True)}
    costs = list(cell_costs(run.root.parent))
    benchmark = plan.pipeline.benchmark.model_dump(mode="json")
    cells = []
    for cell in plan.cells:
        cell_shape = shapes.get(cell.weights)
        size = sizes.get(cell.weights)
        seconds, count = None, 0
        if cell_shape is not None:
            kind = kind_of_cell(cell.peer, speculating=speculates(cell.decode))
            same = [cost for cost in costs if cost.kind == kind]
            seconds, count = seconds_of(cell_passes(cell_shape.weights, benchmark, kind), same)
        peak = None if size is None else PROCESS_BYTES + FOLDERS_HELD * size
        basis: Basis = "shape" if seconds is None else "scaled"
        cells.append(Estimate(cell.name, seconds, peak, None, 0, basis, count))
    return Estimates(steps, tuple(cells), speed_seconds(plan))


def _step(
    plan: Plan, run: RunFolder, step: Step, shape: ModelShape | None, costs: Sequence[Cost]
) -> Estimate:
    title = plan.title(step)
    for cost in costs:
        if cost.where == f"store/{step.key}":
            return Estimate(title, cost.seconds, cost.peak_bytes, cost.disk_bytes, 0, "measured", 1)
    if shape is None:
        return Estimate(title, None, None, None, 0, "shape")
    kind = kind_of_step(step.stage)
    data = {"train": plan.pipeline.data.train, "calibration": plan.pipeline.data.calibration}
    same = [cost for cost in costs if cost.kind == kind]
    seconds, count = seconds_of(step_passes(step.stage, shape, data), same)
    width = WIDTHS[plan.pipeline.model.dtype]
    disk = folder_size(plan, step, shape)
    scratch = round(checkpoint_bytes(step.stage, shape.weights))
    peak = step.memory if step.stage is not None else shape.weights * width
    basis: Basis = "shape" if seconds is None else "scaled"
    return Estimate(title, seconds, peak, disk, scratch, basis, count)


def folder_size(plan: Plan, step: Step, shape: ModelShape) -> int:
    """Bytes of a step's model folder: weights in the pipeline's type, or as its quantizers pack."""
    size = float(shape.weights * WIDTHS[plan.pipeline.model.dtype])
    for ancestor in plan.lineage(step.key):
        size *= 1.0 if ancestor.stage is None else _share(ancestor.stage, shape, plan)
    return round(size)


def _share(stage: Stage, shape: ModelShape, plan: Plan) -> float:
    bits = stage.stored_bits(shape)
    if bits is None:
        return share_written(stage)
    outer = shape.vocab_size * shape.hidden_size * (1 if shape.tie_embeddings else 2)
    whole = 8 * WIDTHS[plan.pipeline.model.dtype]
    held = bits.layers * (shape.weights - outer) + (bits.outer or whole) * outer
    return held / (whole * shape.weights)


def seconds_of(passes: float, costs: Sequence[Cost]) -> tuple[float | None, int]:
    """Seconds of so many passes by those of others, and how many were used; None without any.

    A line by least squares where they have several sizes and it rises from zero or above, else the
    mean ratio.
    """
    if not costs:
        return None, 0
    xs, ys = [cost.passes for cost in costs], [cost.seconds for cost in costs]
    if len(set(xs)) > 1:
        line = statistics.linear_regression(xs, ys)
        if line.slope > 0 and line.intercept >= 0:
            return line.intercept + line.slope * passes, len(costs)
    return passes * sum(ys) / sum(xs), len(costs)


def speed_seconds(plan: Plan) -> float:
    """What the timed rounds take at least: every cell decodes so long in each round and shape."""
    speed = plan.pipeline.benchmark.speed
    shapes = len(speed.batch_sizes) + sum(n != speed.prompt_tokens for n in speed.contexts)
    timed = sum(cell.repeats is None for cell in plan.cells)
    return round(timed * shapes * speed.repeats * speed.min_seconds, 1)
