"""What the parts of one run share: plan, settings, workers, and what has failed so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from compose.mirror import Mirror
from compose.outputs.run_folder import RunFolder
from compose.planning.plan import Cell, Plan
from compose.processes.failures import Failure
from compose.processes.worker_process import Worker
from compose.run.board import Board
from compose.run.workers import RunWorkers
from compose.store import Store


@dataclass(frozen=True)
class Settings:
    """Settings of a run that its plan does not contain."""

    out: Path
    """The folder of runs and of the store."""
    asset_cache: Path
    """Where downloaded models and data are kept."""
    command: str | None = None
    """The command line, for the results."""
    only: tuple[str, ...] = ()
    """Names of cells to measure; empty means all."""
    again: bool = False
    """Measure every cell again. Model folders stay."""
    tensorboard: bool = False
    """Write the training of steps as TensorBoard files in the run's folder."""
    store: Path | None = None
    """The folder of model folders; that of all runs in `out` where it is None."""
    retry_failed: bool = False
    """Try again what crashed, was killed or hit a limit in an earlier run."""
    draw: Callable[[Path, Path], object] | None = None
    """Draws the report of a results file into the run's folder in the end; None draws none."""
    mirror: Mirror | None = None
    """Where finished steps are fetched from and sent to, beside the store."""


@dataclass
class RunState:
    """One run under way."""

    plan: Plan
    settings: Settings
    folder: RunFolder
    workers: RunWorkers
    board: Board
    failed_steps: dict[str, Failure] = field(default_factory=dict)
    """Step key -> why it could not be made."""
    failed_cells: dict[str, Failure] = field(default_factory=dict)
    """Cell name -> why it could not be measured."""
    loaded: dict[str, Worker] = field(default_factory=dict)
    """Cell name -> its process after the quality phases, kept idle until speed is measured."""
    worked: bool = False
    """Whether anything was made or measured."""

    @property
    def store(self) -> Store:
        """Where model folders are."""
        return self.folder.store

    def folder_of(self, cell: Cell) -> Path:
        """The model folder that a cell measures."""
        return self.plan.model_folder(cell, self.store)

    @property
    def baseline(self) -> Cell:
        """The cell that the others are compared with."""
        return self.plan.cells[0]

    def wanted_cells(self) -> list[Cell]:
        """The cells to measure: all, or those of `settings.only` with what they are compared with.

        Raises:
            PlanError: a name in `only` is unknown.
        """
        if not self.settings.only:
            return list(self.plan.cells)
        asked = [self.plan.cell(name) for name in self.settings.only]
        names = {self.baseline.name}
        names |= {name for cell in asked for name in (cell.name, cell.plain) if name is not None}
        return [cell for cell in self.plan.cells if {cell.name, cell.repeats} & names]
