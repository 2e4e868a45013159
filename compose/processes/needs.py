"""What a worker asks of the machine that it is started on, and what it may take at most."""

from __future__ import annotations

from dataclasses import dataclass

from compose.language.limits import Limit
from compose.planning.plan import Cell, Plan, Step
from compose.processes.endings import UNLIMITED, Allowed
from compose.store import Store

PROCESS_BYTES = 800_000_000
"""Memory of a cell's process beside its model: interpreter, torch, compiled code, some text."""
FOLDERS_HELD = 2
"""Bytes that a cell holds, over those of its model folder: weights as stored, and as computed
with."""


@dataclass(frozen=True)
class Needs:
    """What one worker needs. An executor of one machine uses `here` and `allowed` alone."""

    here: bool = False
    """The machine that this process runs on, with all its threads: the worker will be timed."""
    memory: int | None = None
    """Bytes that it is expected to hold at its peak; None where that is not known."""
    gpu: bool = False
    """Whether it works on a GPU where there is one."""
    allowed: Allowed = UNLIMITED


ANYWHERE = Needs()
"""Of a worker that asks for nothing."""


def step_needs(plan: Plan, step: Step) -> Needs:
    """What making a step's folder needs: the plan's estimate, or its limit where that is less."""
    limit, gpu = plan.pipeline.limits.step, step.stage is not None and step.stage.on_gpu
    return Needs(memory=_within(step.memory, limit), gpu=gpu, allowed=_allowed(limit, "step"))


def cell_needs(plan: Plan, cell: Cell, store: Store, *, here: bool = False) -> Needs:
    """What measuring a cell needs, from the size of its folder."""
    limit, size = plan.pipeline.limits.cell, folder_bytes(plan, cell, store)
    memory = None if size is None else PROCESS_BYTES + FOLDERS_HELD * size
    allowed = _allowed(limit, "cell")
    return Needs(here=here, memory=_within(memory, limit), allowed=allowed)


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
