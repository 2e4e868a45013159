"""What the parts of one run share: plan, settings, display, workers, and what has failed so far."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from compose.contract import ANYWHERE, CellCommand, Job, Message, Needs, role_of, write_job
from compose.errors import StepError
from compose.mirror import Mirror
from compose.outputs.run_folder import RunFolder
from compose.planning.plan import Cell, Plan
from compose.processes.endings import Failure
from compose.processes.executors import Executor
from compose.processes.worker_process import Worker, await_answer
from compose.store import Store


class Line(Protocol):
    """The line of one job. Safe to call from any thread."""

    def update(
        self, done: int, total: int, phase: str = "", /, *, detail: str = "", **numbers: float
    ) -> None:
        """The job has finished `done` of `total` parts, or bytes; as `Progress` in `units`."""

    def done(self, note: str = "") -> None:
        """The job ended well."""

    def failed(self, note: str) -> None:
        """The job failed."""


class Board(Protocol):
    """The lines of a run."""

    def line(self, name: str, *, step: str | None = None, cell: str | None = None) -> Line:
        """A line for a new job, and which step or cell it is about."""

    def print(self, text: str) -> None:
        """Print a line that stays."""


def show_progress(line: Line, message: Message) -> None:
    """Show a worker's progress message on a line."""
    done, total, phase, *more = message["progress"]
    line.update(done, total, phase, **(more[0] if more else {}))


class RunWorkers:
    """Starts the workers of a run. Safe to use from several threads."""

    def __init__(self, executor: Executor, folder: RunFolder) -> None:
        self.executor = executor
        self._folder = folder
        self._live: set[Worker] = set()
        self._lock = threading.Lock()
        self._ending = False

    def start(self, name: str, job: Job, needs: Needs = ANYWHERE) -> Worker:
        """Start a worker on a job, with the job file and log of `name`.

        Raises:
            StepError: `end_all` was called before.
        """
        role = role_of(job)
        file = self._folder.job(f"{name}.{role}")
        write_job(file, job)
        log = self._folder.log(name)
        with self._lock:
            if self._ending:
                raise StepError("the run is ending")
            worker = self.executor.start(role, file, log, needs)
            self._live.add(worker)
        return worker

    def call(self, name: str, job: Job, line: Line, needs: Needs = ANYWHERE) -> dict[str, Any]:
        """Start a worker, wait for its one answer, and end it. Raises as `answer`."""
        worker = self.start(name, job, needs)
        try:
            return self.answer(worker, line)
        finally:
            self.end(worker)

    def ask(self, worker: Worker, command: CellCommand, line: Line) -> dict[str, Any]:
        """Send a worker a command and wait for the answer. Raises as `answer`."""
        worker.send(command)
        return self.answer(worker, line)

    def answer(self, worker: Worker, line: Line) -> dict[str, Any]:
        """The worker's next answer; its progress is shown on `line`.

        Raises:
            ComposeError: the work failed, or the worker died.
        """
        result: dict[str, Any] = await_answer(worker, partial(show_progress, line))
        return result

    def end(self, worker: Worker) -> None:
        """End a worker."""
        with self._lock:
            self._live.discard(worker)
        worker.stop()

    def end_all(self) -> None:
        """End every worker that is left, and refuse to start further ones."""
        with self._lock:
            self._ending = True
            left = list(self._live)
        stopping = [threading.Thread(target=worker.stop) for worker in left]
        for thread in stopping:  # one that does not listen keeps no other waiting
            thread.start()
        for thread in stopping:
            thread.join()


@dataclass
class Task:
    """Something to do after all that it needs was tried.

    `work` handles its failures itself: an exception that it raises ends the whole graph.
    """

    name: str
    work: Callable[[], None]
    needs: tuple[str, ...] = ()
    """Names of other tasks."""


@dataclass(frozen=True)
class Missing:
    """One thing that a run needs and this machine lacks."""

    what: str
    """A sentence without a full stop."""
    fix: str | None = None
    """What puts it right."""

    def __str__(self) -> str:
        return self.what if self.fix is None else f"{self.what}\n  fix: {self.fix}"


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
    room: bool = True
    """Refuse a plan that disk or memory cannot hold; a search drops such chains instead."""


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
        selected = [self.plan.cell(name) for name in self.settings.only]
        names = {self.baseline.name}
        names |= {name for cell in selected for name in (cell.name, cell.plain) if name is not None}
        return [cell for cell in self.plan.cells if {cell.name, cell.repeats} & names]
