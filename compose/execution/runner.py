"""Runs a plan: what is on disk stays, the rest is made, one process a step or cell.

    steps     in the plan's order; each is made in one process and loaded again in another
    quality   of every cell, one process each
    speed     rounds interleaved over the processes of all cells, the baseline in every group
    result    results.json, the report, and the exports that the pipeline names

A failure becomes data: what depends on it fails with its reason, all else goes on. Whatever ends
this process, the next run goes on from the last finished step, cell phase or round.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout
from rich.console import Console

from compose.errors import AssetError, ComposeError, StepError, UserError
from compose.execution.executors import Executor, Remote, Role, await_answer
from compose.execution.run_folder import (
    Failure,
    Gathered,
    Phase,
    RunFolder,
    Session,
    find_session,
    gather,
    learns_from,
    new_session,
    phases_of,
    read_phase,
    speed_settings,
    write_phase,
)
from compose.planning.plan import Cell, Plan, Step
from compose.results.environment import capture_environment
from compose.results.io import load_results, save_results
from compose.results.schema import Results
from compose.store import Store, write_json
from compose.terminal.progress import Board, Line

PROCESS_BYTES = 600_000_000
"""Memory of a cell's process beside its model: interpreter, torch, compiled code."""

MEMORY_SHARE = 0.8
"""How much of the free memory the cells of a group may take together."""


PARKING_ROOM = 8_000_000_000
"""Free memory, in bytes, below which no further process is kept between quality and speed."""

LOADED_AT_ONCE = 2
"""Cells that load side by side before speed is measured: loading hardly uses a second core."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    exit_code: int
    """0, or 1 when a cell failed."""
    folder: RunFolder
    results: Results
    worked: bool
    """False when everything was there already."""


@dataclass(frozen=True)
class Settings:
    """What a run is told beside its plan."""

    out: Path
    asset_cache: Path
    command: str | None = None
    only: tuple[str, ...] = ()
    """Names of cells to measure; empty means all."""
    again: bool = False
    """Measure every cell again. Model folders stay."""


def run(plan: Plan, settings: Settings, executor: Executor, console: Console) -> RunResult:
    """Run a plan; all that it makes is under `settings.out`.

    Raises:
        UserError: the source model cannot be had, a name in `only` is unknown, or another process
            is at work on this run.
    """
    folder = RunFolder.of(plan, settings.out)
    folder.root.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder.root / ".lock", timeout=0):
            runner = Runner(plan, settings, executor, folder, Board(console))
            with runner.board.shown():
                return runner.run()
    except Timeout:
        raise UserError(
            f"another process is at work on {folder.root}",
            fix="wait for it, or give this run another --out or the pipeline another name",
        ) from None
    finally:
        executor.close()


@dataclass
class Task:
    """Something to do once all it needs was tried; `work` keeps failures to itself."""

    name: str
    work: Callable[[], None]
    needs: tuple[str, ...] = ()


def thread_pool(slots: int) -> ThreadPoolExecutor:
    """Threads for `run_graph`. It must outlive every worker that its threads start and leave alive:
    the kernel ends a worker with the thread that started it (PR_SET_PDEATHSIG).
    """
    return ThreadPoolExecutor(max_workers=slots, thread_name_prefix="worker")


def run_graph(
    tasks: Iterable[Task], slots: int, abort: Callable[[], None], pool: ThreadPoolExecutor
) -> None:
    """Do all tasks, each after those it needs, at most `slots` at a time, in order where it can.

    What a task raises, or Ctrl-C, ends the graph: `abort` has to end the tasks that are running.
    """
    waiting = list(tasks)
    done: set[str] = set()
    running: dict[Future[None], str] = {}
    try:
        while waiting or running:
            ready = [task for task in waiting if done.issuperset(task.needs)]
            for task in ready[: slots - len(running)]:
                waiting.remove(task)
                running[pool.submit(task.work)] = task.name
            assert running, f"tasks that can never begin: {[task.name for task in waiting]}"
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                done.add(running.pop(future))
                future.result()
    except BaseException:
        abort()
        wait(running)
        raise


@dataclass
class Runner:
    """The state of one run."""

    plan: Plan
    settings: Settings
    executor: Executor
    folder: RunFolder
    board: Board
    failed_steps: dict[str, Failure] = field(default_factory=dict)
    """Step key -> why it could not be made."""
    failed_cells: dict[str, Failure] = field(default_factory=dict)
    """Cell name -> why it could not be measured."""
    worked: bool = False
    parked: dict[str, Remote] = field(default_factory=dict)
    """Cell name -> its process after the quality phases: loaded, and idle until the speed phase."""
    _live: set[Any] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _ending: bool = False

    def run(self) -> RunResult:
        """All phases; on the way out, however that is, no worker is left."""
        cells = self.wanted_cells()
        write_json(self.folder.plan_file, self.plan.to_json())
        if self.settings.again:
            shutil.rmtree(self.folder.root / "cells", ignore_errors=True)
            shutil.rmtree(self.folder.speed, ignore_errors=True)
        environment = capture_environment(self.plan.pipeline.benchmark.threads)
        with thread_pool(self.executor.slots) as pool:
            try:
                tasks = [*self.step_tasks(cells), *self.quality_tasks(cells)]
                run_graph(tasks, self.executor.slots, self.end_workers, pool)
                session = self.measure_speed(cells, environment)
            finally:
                self.end_workers()
        return self.conclude(session, environment)

    # --- What is to be done ---------------------------------------------------------------------

    @property
    def store(self) -> Store:
        """Where model folders are."""
        return self.folder.store

    @property
    def baseline(self) -> Cell:
        """The cell that the others are compared with."""
        return self.plan.cells[0]

    def wanted_cells(self) -> list[Cell]:
        """The cells to measure: all, or those asked for with what they are compared with."""
        if not self.settings.only:
            return list(self.plan.cells)
        asked = [self.plan.cell(name) for name in self.settings.only]
        names = {self.baseline.name}
        names |= {name for cell in asked for name in (cell.name, cell.plain) if name is not None}
        return [cell for cell in self.plan.cells if {cell.name, cell.repeats} & names]

    def step_tasks(self, cells: list[Cell]) -> list[Task]:
        """Make every model folder that the cells need. The source is needed as the teacher, too."""
        needed = {step.key for cell in cells for step in self.plan.lineage(cell.weights)}
        return [
            Task(step.key, partial(self.make_step, step), _needs(step))
            for step in self.plan.steps
            if step.key in needed
        ]

    def quality_tasks(self, cells: list[Cell]) -> list[Task]:
        """Measure the quality of every cell; the baseline first, the others compare with it."""
        after = (self.baseline.name,)
        return [
            Task(
                cell.name,
                partial(self.measure_quality, cell),
                (cell.weights, self.baseline.weights, *(() if cell is self.baseline else after)),
            )
            for cell in cells
        ]

    # --- Steps ----------------------------------------------------------------------------------

    def make_step(self, step: Step) -> None:
        """Make a step's folder, unless it is there or what it starts from could not be made."""
        if step.parent in self.failed_steps:
            self.failed_steps[step.key] = self.failed_steps[step.parent]
            return
        if self.store.has(step.key):
            return
        line = self.board.line(self.title(step))
        try:
            with self.lock_step(step.key, line):
                if self.store.has(step.key):  # another run made it while we waited
                    line.done("made by another run")
                    return
                self.worked = True
                self.write_step(step, line)
        except ComposeError as error:
            line.failed(_first_line(error))
            if isinstance(error, AssetError) and step.stage is None:
                raise  # without the source nothing can run, and the user can put it right
            self.failed_steps[step.key] = _failure(error, step.name)
        else:
            line.done()

    def title(self, step: Step) -> str:
        """What a step is called on the board."""
        of = f" {self.plan.pipeline.model.source}" if step.stage is None else ""
        return self.plan.title(step) + of

    @contextmanager
    def lock_step(self, key: str, line: Line) -> Iterator[None]:
        """Hold the step's lock; say so when another run holds it."""
        try:
            with self.store.locked(key, timeout=0.2):
                yield
        except Timeout:
            line.update(0, 1, "another run is making it: waiting")
            with self.store.locked(key):
                yield

    def write_step(self, step: Step, line: Line) -> None:
        """Make the folder in one process, and load it again in another."""
        record: dict[str, Any] = {}
        name = "-".join(("step", *(step.chain or ("source",)), step.key))
        with self.store.write(step.key, record) as entry:
            check = entry / "check.safetensors"
            job = self.step_job(step, entry / "model", check)
            record |= self.call("step", name, job, line)
            line.update(1, 1, "loading it again")
            again = {"folder": str(entry / "model"), "reference": str(check)}
            record["reload"] = self.call("check", name, again, line)

    def step_job(self, step: Step, target: Path, check: Path) -> dict[str, Any]:
        """All that the step's process is told."""
        pipeline = self.plan.pipeline
        return {
            "key": step.key,
            "name": step.name,
            "stage": None if step.stage is None else step.stage.model_dump(mode="json"),
            "model": pipeline.model.source,
            "dtype": pipeline.model.dtype,
            "seed": step.seed,
            "data": pipeline.data.model_dump(mode="json"),
            "source": None if step.parent is None else str(self.store.model(step.parent)),
            "dense": str(self.store.model(self.plan.steps[0].key)),
            "target": str(target),
            "check": str(check),
            "work": str(self.store.work(step.key)),
            "asset_cache": str(self.settings.asset_cache.absolute()),
        }

    # --- Cells ----------------------------------------------------------------------------------

    def measure_quality(self, cell: Cell) -> None:
        """Run those phases of a cell that have no record yet, in one process."""
        if cell.weights in self.failed_steps:
            self.failed_cells[cell.name] = self.failed_steps[cell.weights]
            return
        if self.is_measured(cell) and not (cell is self.baseline and self.lacks_reference()):
            return
        reference = self.folder.reference(self.baseline.key)
        self.worked = True
        line = self.board.line(f"measure {cell.name}")
        remote: Remote | None = None
        phase: Phase = "load"
        result: dict[str, Any] = {}
        try:
            remote = self.open_cell(cell, f"cell-{cell.name}")
            for phase in phases_of(cell):
                line.update(0, 1, phase)
                command = {"do": phase, "reference": str(reference)}
                started = time.monotonic()
                result = self.ask(remote, command, line)
                seconds = time.monotonic() - started
                write_phase(self.folder, self.plan, cell, phase, result, seconds)
        except ComposeError as error:
            line.failed(_first_line(error))
            if isinstance(error, AssetError) and cell is self.baseline:
                raise  # the other cells need the same data, and the user can put it right
            self.failed_cells[cell.name] = _failure(error, phase)
        else:
            line.done(_quality_note(result))
            remote = self.park(cell, remote)
        finally:
            if remote is not None:
                self.end(remote)

    def park(self, cell: Cell, remote: Remote | None) -> Remote | None:
        """Keep a cell's process for the speed phase, where it runs here and memory allows.

        Returns what is not kept. Importing and loading again would take longer than measuring.
        """
        free = psutil.virtual_memory().available
        timed = cell.repeats is None and self.executor.parks
        if remote is None or not timed or free < PARKING_ROOM:
            return remote
        with self._lock:
            if not self._ending:
                self.parked[cell.name] = remote
                return None
        return remote

    def is_measured(self, cell: Cell) -> bool:
        """Whether every phase of a cell, beside speed, has its record."""
        records = (read_phase(self.folder, self.plan, cell, phase) for phase in phases_of(cell))
        return all(record is not None for record in records)

    def lacks_reference(self) -> bool:
        """Whether a cell still has to be compared with baseline predictions that are not there."""
        if not self.plan.pipeline.benchmark.quality.perplexity:
            return False
        if self.folder.reference(self.baseline.key).is_file():
            return False
        return not all(map(self.is_measured, self.wanted_cells()))

    def open_cell(self, cell: Cell, name: str, *, here: bool = False) -> Remote:
        """Start a cell's process; it loads nothing yet."""
        pipeline = self.plan.pipeline
        job = {
            "name": cell.name,
            "folder": str(self.store.model(cell.weights)),
            "baseline_folder": str(self.store.model(self.baseline.weights)),
            "decode": None if cell.decode is None else cell.decode.model_dump(mode="json"),
            "benchmark": pipeline.benchmark.model_dump(mode="json"),
            "seed": pipeline.seed,
            "dtype": pipeline.model.dtype,
            "asset_cache": str(self.settings.asset_cache.absolute()),
            "reference": str(self.folder.reference(self.baseline.key)),
            "threads": pipeline.benchmark.threads,
            "learns_from": learns_from(self.plan) if cell is self.baseline else [],
        }
        return self.start("cell", name, job, here=here)

    # --- Speed ----------------------------------------------------------------------------------

    def measure_speed(self, cells: list[Cell], environment: dict[str, Any]) -> Session | None:
        """Measure the cells that have not failed, in rounds; go on with a session that was begun.

        Speeds are compared only within a session: a new or changed cell begins a new one.
        """
        timed = [cell for cell in cells if cell.repeats is None]
        able = [cell for cell in timed if cell.name not in self.failed_cells]
        if not able:
            return None
        settings = speed_settings(self.plan, environment)
        session = find_session(self.folder, settings, able)
        if session is not None and session.finished():
            return session
        self.worked = True
        if session is None or set(session.members) != {cell.name for cell in able}:
            groups = self.memory_groups(able)
            command = self.settings.command or ""
            session = new_session(self.folder, settings, able, groups, environment, command)
        by_name = {cell.name: cell for cell in able}
        line = self.board.line("speed")
        for number, names in enumerate(session.groups):
            self.measure_group(session, number, [by_name[name] for name in names], line)
        line.done(f"{len(able)} cells, {len(session.groups)} group(s)")
        for other in self.folder.speed.glob("*.jsonl"):
            if other != session.file:
                other.unlink()
        return session

    def memory_groups(self, cells: list[Cell]) -> list[list[str]]:
        """Cells that fit into free memory together, in order, the baseline in every group."""
        sizes = {cell.name: self.memory_of(cell) for cell in cells}
        held = sum(sizes[name] for name in self.parked if name in sizes)
        limit = MEMORY_SHARE * (psutil.virtual_memory().available + held)
        first = [cell.name for cell in cells if cell is self.baseline]
        groups: list[list[str]] = [list(first)]
        for cell in cells:
            if cell is self.baseline:
                continue
            used = sum(sizes[name] for name in groups[-1])
            if used + sizes[cell.name] > limit and len(groups[-1]) > len(first):
                groups.append(list(first))
            groups[-1].append(cell.name)
        return groups

    def memory_of(self, cell: Cell) -> int:
        """Bytes that a cell's process is expected to hold."""
        size = (read_phase(self.folder, self.plan, cell, "load") or {}).get("size", {})
        return PROCESS_BYTES + int(size.get("resident_bytes") or size.get("disk_bytes") or 0)

    def measure_group(self, session: Session, group: int, cells: list[Cell], line: Line) -> None:
        """Run the group's rounds that are missing, all its processes alive at once."""
        open_places = [p for p in session.places() if p[0] == group and not session.complete(p)]
        if not open_places:
            return
        remotes: dict[str, Remote] = {}
        try:
            for first in range(0, len(cells), LOADED_AT_ONCE):
                some = cells[first : first + LOADED_AT_ONCE]
                line.update(first, len(cells), f"loading {', '.join(cell.name for cell in some)}")
                self.load_for_speed(some, remotes, line)
            for place in open_places:
                self.measure_round(session, place, cells, remotes, line)
        finally:
            for remote in remotes.values():
                self.end(remote)

    def load_for_speed(self, cells: list[Cell], remotes: dict[str, Remote], line: Line) -> None:
        """Take the processes of some cells that stand ready; let the others load side by side."""
        cold = [cell for cell in cells if cell.name not in self.parked]
        for cell in cells:
            if cell.name in self.parked:
                remotes[cell.name] = self.parked.pop(cell.name)
        for cell in cold:
            remotes[cell.name] = self.open_cell(cell, f"speed-{cell.name}", here=True)
            remotes[cell.name].send({"do": "load"})
        for cell in cold:
            self.guard_cell(cell, partial(self.answer, remotes[cell.name], line))

    def measure_round(
        self,
        session: Session,
        place: tuple[int, int, int],
        cells: list[Cell],
        remotes: dict[str, Remote],
        line: Line,
    ) -> None:
        """One round: every cell once. Each round begins with another cell, so none is favoured."""
        _, batch, number = place
        offset = number % len(cells)
        numbers: dict[str, dict[str, Any]] = {}
        started = time.monotonic()
        places = session.places()
        for cell in [*cells[offset:], *cells[:offset]]:
            if cell.name in self.failed_cells:
                continue
            note = f"batch {batch}, round {number + 1}: {cell.name}"
            line.update(places.index(place), len(places), note)
            command = {
                "do": "speed",
                "round": number,
                "batch": batch,
                "threads": self.executor.timed_threads,
            }
            answer = self.guard_cell(cell, partial(self.ask, remotes[cell.name], command, line))
            if answer is not None:
                numbers[cell.name] = answer
        session.add(place, numbers, time.monotonic() - started)

    def guard_cell(self, cell: Cell, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What `work` answers; a failure of the speed phase becomes the cell's, and None."""
        try:
            return work()
        except ComposeError as error:
            self.failed_cells[cell.name] = _failure(error, "speed")
            self.board.say(f"✗ speed of {cell.name}: {_first_line(error)}")
            return None

    # --- Workers --------------------------------------------------------------------------------

    def start(self, role: Role, name: str, job: dict[str, Any], *, here: bool = False) -> Remote:
        """Start a worker on a job; it is ended with the run at the latest."""
        file = self.folder.job(f"{name}.{role}")
        write_json(file, job)
        with self._lock:
            if self._ending:
                raise StepError("the run is ending")
            remote = self.executor.start(role, file, self.folder.log(name), here=here)
            self._live.add(remote)
        return remote

    def call(self, role: Role, name: str, job: dict[str, Any], line: Line) -> dict[str, Any]:
        """Start a worker, wait for its one answer, end it."""
        remote = self.start(role, name, job)
        try:
            return self.answer(remote, line)
        finally:
            self.end(remote)

    def ask(self, remote: Remote, command: dict[str, Any], line: Line) -> dict[str, Any]:
        """Give a cell's process a command and wait for the answer."""
        remote.send(command)
        return self.answer(remote, line)

    def answer(self, remote: Remote, line: Line) -> dict[str, Any]:
        """The next answer, progress passed on.

        Raises:
            ComposeError: the work failed, or the worker died.
        """

        def listen(message: dict[str, Any]) -> None:
            line.update(*message["progress"])

        result: dict[str, Any] = await_answer(remote, listen)
        return result

    def end(self, remote: Remote) -> None:
        """End a worker."""
        with self._lock:
            self._live.discard(remote)
        remote.stop()

    def end_workers(self) -> None:
        """End every worker that is left, and let none begin."""
        with self._lock:
            self._ending = True
            left = list(self._live)
        for remote in left:
            remote.stop()

    # --- The end --------------------------------------------------------------------------------

    def conclude(self, session: Session | None, environment: dict[str, Any]) -> RunResult:
        """Write results and report where they changed, and make the exports."""
        told = Gathered(self.failed_cells, session, environment, self.settings.command)
        results = gather(self.folder, self.plan, told)
        if self.worked or not self._same_as_written(results):
            self.worked = True
            save_results(results, self.folder.results_file)
            self.render()
        self.export(results)
        self.sweep()
        failed = [cell for cell in results.cells if cell.status == "failed"]
        return RunResult(1 if failed else 0, self.folder, results, self.worked)

    def sweep(self) -> None:
        """Remove what baselines of earlier plans predicted: it is large, and of no more use."""
        current = self.folder.reference(self.baseline.key)
        for file in current.parent.glob(".reference-*"):
            if file != current:
                file.unlink()

    def _same_as_written(self, results: Results) -> bool:
        report = self.folder.root / "report.html"
        if not (self.folder.results_file.is_file() and report.is_file()):
            return False
        try:
            return load_results(self.folder.results_file).model_dump() == results.model_dump()
        except UserError:
            return False

    def render(self) -> None:
        """Draw the report beside the results."""
        from reports.render import render

        render(self.folder.results_file, self.folder.root)

    def export(self, results: Results) -> None:
        """Make the exports that the pipeline names, of cells that did not fail."""
        from compose.execution.export import export_cell, is_current

        for name, wanted in self.plan.pipeline.export.items():
            cell, target = self.plan.cell(name), Path(wanted.to)
            measured = results.find(cell.name)
            if measured is None or measured.status != "ok":
                self.board.say(f"✗ no export of {name}: the cell was not measured")
                continue
            if is_current(self.folder, cell.name, target):
                continue
            self.worked = True
            line = self.board.line(f"export {name} to {target}")
            export_cell(self.folder, cell.name, target, self.executor)
            line.done()


def _needs(step: Step) -> tuple[str, ...]:
    return () if step.parent is None else (step.parent,)


def _failure(error: Exception, failed_in: str) -> Failure:
    """An exception as data. The traceback of a worker travels as a note of the exception."""
    notes = getattr(error, "__notes__", [])
    return Failure(_first_line(error), failed_in, "\n".join(notes) or str(error))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def _quality_note(result: dict[str, Any]) -> str:
    """What is worth saying of a finished cell on one line."""
    perplexity = (result.get("perplexity") or {}).get("value")
    if perplexity is not None:
        return f"perplexity {perplexity:.2f}"
    if "lossless" in result:
        return "lossless" if result["lossless"] else "not lossless"
    return ""
