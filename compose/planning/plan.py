"""A plan: the steps that make model folders, the cells to measure, and what is left out.

`planner.make_plan` makes one. It is frozen and needs no weights; a step's key is its value, so
equal steps of two chains run once.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from compose.bench.peers.table import parse_peer
from compose.contract import Allowed, Needs
from compose.errors import PlanError, suggest
from compose.language.limits import Limit
from compose.language.schema import Chain, Pipeline, Quality
from compose.stages.base import ModelShape, Stage
from compose.store import Store

SOURCE = "source"
"""Name of the step that stores the source model."""
SPECULATE = "speculate"
"""The decode stage that drafts and verifies."""
PROCESS_BYTES = 800_000_000
"""Memory of a cell's process beside its model: interpreter, torch, compiled code, some text."""
FOLDERS_HELD = 2
"""Bytes that a cell holds, over those of its model folder: weights as stored, and as computed
with."""
Origin = Literal["baseline", "pipeline", "matrix", "plain", "peer", "bench"]


@dataclass(frozen=True)
class Step:
    """One model folder to make. Its key is 16 hex digits, the same for equal steps."""

    key: str
    name: str
    """The stage's name in the file, or `source`."""
    stage: Stage | None
    """None for the source model."""
    parent: str | None
    """Key of the step whose folder this one starts from."""
    chain: Chain
    """Names of the stages up to and with this one."""
    seed: int
    """Seed of its random numbers."""
    memory: int | None = None
    """Estimated peak memory of its process, in bytes; None where sizes are not known."""


@dataclass(frozen=True)
class Cell:
    """One configuration to measure: a model folder, and how it is decoded."""

    name: str
    """`dense`, a named pipeline's name, or the chain's stages joined by `+`."""
    chain: Chain
    key: str
    """16 hex digits, of the weights and the decode stage: equal cells are one cell."""
    weights: str
    """Key of the step that makes the folder."""
    decode: Stage | None
    plain: str | None
    """The cell with the same weights and no decode stage; None where this is that cell."""
    origin: Origin
    """What asked for it; `plain` cells are added so that a decode stage is compared with them,
    `bench` cells are folders that were there before."""
    aliases: tuple[str, ...] = ()
    """Other names that mean this cell."""
    repeats: str | None = None
    """The cell of which this one is a repeat with another seed."""
    peer: str | None = None
    """The other engine that runs the folder, as in `llama.cpp:q4_k_m`; None for our decoder."""
    folder: str | None = None
    """The model folder, where no step of the plan makes it."""
    dtype: str | None = None
    """The type to load it in, where it is not the pipeline's."""
    backend: str = "auto"
    """What runs the model; `auto` lets the folder decide."""

    @property
    def calibrates_peer(self) -> bool:
        """Whether it is another engine whose weights are fitted to the calibration text."""
        return self.peer is not None and parse_peer(self.peer).reads_text


@dataclass(frozen=True)
class LeftOut:
    """A combination of the matrix that is not planned."""

    name: str
    chain: Chain
    rule: str
    """A name in `compose.stages.rules.RULES`."""
    message: str


@dataclass(frozen=True)
class Plan:
    """Steps in an order in which they can run, cells with the baseline first, and the rest."""

    pipeline: Pipeline
    steps: tuple[Step, ...]
    cells: tuple[Cell, ...]
    left_out: tuple[LeftOut, ...]

    def step(self, key: str) -> Step:
        """The step with this key; KeyError when the plan has none."""
        return {step.key: step for step in self.steps}[key]

    def title(self, step: Step) -> str:
        """The chain that ends with a step, and its seed where it is not the pipeline's first."""
        seed = "" if step.seed == self.pipeline.seed else f"@{step.seed}"
        return ("+".join(step.chain) or step.name) + seed

    def lineage(self, key: str) -> tuple[Step, ...]:
        """The steps from the source up to and with the one with this key."""
        step = self.step(key)
        return (step,) if step.parent is None else (*self.lineage(step.parent), step)

    def shapes(self, source: ModelShape | None) -> dict[str, ModelShape | None]:
        """Step key -> the shape of the model that the step makes, from that of the source."""
        shapes: dict[str, ModelShape | None] = {}
        for step in self.steps:
            before = source if step.parent is None else shapes[step.parent]
            stage = step.stage
            shapes[step.key] = before if before is None or stage is None else stage.reshape(before)
        return shapes

    def model_folder(self, cell: Cell, store: Store) -> Path:
        """The model folder of a cell: the one it names, or the one that its step makes."""
        return Path(cell.folder) if cell.folder is not None else store.model(cell.weights)

    def cell(self, name: str) -> Cell:
        """The cell of this name or alias.

        Raises:
            PlanError: no cell has this name; the error of one that was left out names the rule.
        """
        for cell in self.cells:
            if name == cell.name or name in cell.aliases:
                return cell
        for left in self.left_out:
            if name == left.name:
                raise PlanError(f"cell {name!r} is left out: {left.message} [rule {left.rule}]")
        names = [alias for cell in self.cells for alias in (cell.name, *cell.aliases)]
        raise PlanError(f"no cell is named {name!r}: {suggest(name, names)}")

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON, for plan.json and scripts."""
        return {
            "schema_version": 1,
            "run": self.pipeline.name,
            "baseline": self.cells[0].name,
            "limits": self.pipeline.limits.model_dump(mode="json"),
            "steps": [_step_json(step) for step in self.steps],
            "cells": [_cell_json(cell) for cell in self.cells],
            "left_out": [vars(left) | {"chain": list(left.chain)} for left in self.left_out],
        }


def why_no_baseline(cell: Cell, quality: Quality) -> str | None:
    """Why the other cells cannot be compared with a cell of ours, in words; None where they can."""
    if cell.repeats is not None:
        return f"{cell.name!r} repeats {cell.repeats!r} with another seed, and is not timed"
    scored = quality.perplexity or quality.own_answers is not None
    if scored and cell.decode is not None:
        return (
            f"{cell.name!r} decodes in a way of its own: quality is compared with the predictions "
            "of a cell that decodes plainly"
        )
    return None


def speculates(decode: Stage | None) -> bool:
    """Whether a cell with this decode stage speculates: it then gives the plain cell's tokens."""
    return decode is not None and decode.use == SPECULATE


def _stage_json(stage: Stage | None) -> dict[str, Any] | None:
    return None if stage is None else stage.model_dump(mode="json")


def _step_json(step: Step) -> dict[str, Any]:
    return vars(step) | {"stage": _stage_json(step.stage), "chain": list(step.chain)}


def _cell_json(cell: Cell) -> dict[str, Any]:
    lists = {"chain": list(cell.chain), "aliases": list(cell.aliases)}
    return vars(cell) | {"decode": _stage_json(cell.decode)} | lists


def step_needs(plan: Plan, step: Step) -> Needs:
    """What making a step's folder needs: the plan's estimate, or its limit where that is less."""
    limit = plan.pipeline.limits.step
    gpu = _uses_gpu(plan) and step.stage is not None and step.stage.on_gpu
    return Needs(memory=_within(step.memory, limit), gpu=gpu, allowed=_allowed(limit, "step"))


def cell_needs(plan: Plan, cell: Cell, store: Store, *, here: bool = False) -> Needs:
    """What measuring a cell needs, from the size of its folder."""
    limit, size = plan.pipeline.limits.cell, folder_bytes(plan, cell, store)
    memory = None if size is None else PROCESS_BYTES + FOLDERS_HELD * size
    allowed = _allowed(limit, "cell")
    gpu = _uses_gpu(plan) and cell.peer is None
    return Needs(here=here, memory=_within(memory, limit), gpu=gpu, allowed=allowed)


def _uses_gpu(plan: Plan) -> bool:
    return plan.pipeline.model.device != "cpu"


def folder_bytes(plan: Plan, cell: Cell, store: Store) -> int | None:
    """Bytes of the files in a cell's model folder; None where they are not there."""
    try:
        folder = plan.model_folder(cell, store)
        return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    except OSError:
        return None


def _within(memory: int | None, limit: Limit) -> int | None:
    most = _bytes(limit)
    return memory if most is None else min(most, memory or most)


def _allowed(limit: Limit, what: str) -> Allowed:
    return Allowed(limit.seconds, _bytes(limit), f"limits.{what}")


def _bytes(limit: Limit) -> int | None:
    return None if limit.memory_mb is None else round(limit.memory_mb * 1e6)
