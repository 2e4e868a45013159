"""Runs a plan: keeps what is on disk and makes the rest, in one process a step or cell.

    ready     all that the plan needs is here, or is fetched; else the run ends with one list
    steps     in the plan's order; each is made in one process and loaded again in another
    quality   of every cell, one process each
    speed     rounds interleaved over the processes of all cells, the baseline in every group
    result    results.json, the report, and the exports that the pipeline names

A failure becomes data: steps and cells that need it fail with the same reason, others go on.
Crashes and limits that were hit are kept (`failures`); other failures are tried again.
After an end of this process, the next run goes on from the last finished step, phase or round.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compose.analysis.spread import stored_spread
from compose.errors import ComposeError, UserError
from compose.outputs.gather import gather
from compose.outputs.run_folder import RunFolder
from compose.outputs.sessions import Session
from compose.planning.fingerprint import fingerprint
from compose.planning.plan import Plan
from compose.processes.endings import first_line
from compose.processes.executors import Executor
from compose.processes.worker_process import remove_scratch
from compose.results.io import load_results, save_results
from compose.results.schema import Results
from compose.run.cells import quality_tasks
from compose.run.failures import forget_failures
from compose.run.preflight import require_ready
from compose.run.speed import measure_speed
from compose.run.state import Board, RunState, RunWorkers, Settings, Task
from compose.run.steps import step_tasks
from compose.store import remove_unfinished, remove_unfinished_of, write_json


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    exit_code: int
    """0, or 1 when a cell or an export failed."""
    folder: RunFolder
    results: Results
    worked: bool
    """False when everything had been made and measured before."""


def run(plan: Plan, settings: Settings, executor: Executor, board: Board) -> RunResult:
    """Run a plan; everything that it makes is under `settings.out`, but for its exports.

    The executor is closed in the end.

    Raises:
        UserError: something that the plan needs is missing (`preflight`), a name in `only` is
            unknown, another process is at work on this run, or a folder to export to holds
            something else.
    """
    folder = RunFolder.of(plan, settings.out, settings.store)
    try:
        with folder.locked():
            return _run(RunState(plan, settings, folder, RunWorkers(executor, folder), board))
    finally:
        executor.close()


def _run(run: RunState) -> RunResult:
    """All phases; on the way out, however that is, no worker is left."""
    cells, slots = run.wanted_cells(), run.workers.executor.slots
    _sweep(run)
    _require_targets(run)
    require_ready(run, cells)
    write_json(run.folder.plan_file, run.plan.to_json())
    if run.settings.again or run.settings.retry_failed:
        forget_failures(run)
    if run.settings.again:
        shutil.rmtree(run.folder.root / "cells", ignore_errors=True)
        shutil.rmtree(run.folder.speed, ignore_errors=True)
    environment = _with_spread(_environment(run))
    with thread_pool(slots) as pool:
        try:
            tasks = [*step_tasks(run, cells), *quality_tasks(run, cells)]
            run_graph(tasks, slots, run.workers.end_all, pool)
            session = measure_speed(run, cells, environment, fingerprint())
        finally:
            run.workers.end_all()
            remove_scratch(run.folder.log("any"))
    return _conclude(run, session, environment)


def _sweep(run: RunState) -> None:
    """Remove what a killed process of this run, or of one that shares its store, left behind."""
    remove_unfinished(run.folder.root)
    remove_scratch(run.folder.log("any"))
    with contextlib.suppress(OSError):  # a store that is not ours to write
        run.store.sweep()
    for export in run.plan.pipeline.export.values():
        remove_unfinished_of(Path(export.to).absolute())


def _require_targets(run: RunState) -> None:
    """Refuse a folder to export to that holds something else, at its line, before all work."""
    from compose.outputs.export import refuse_foreign

    for name, export in run.plan.pipeline.export.items():
        try:
            refuse_foreign(Path(export.to))
        except UserError as error:
            raise run.plan.pipeline.locate(error, ("export", name, "to")) from None


def _environment(run: RunState) -> dict[str, Any]:
    """The machine that speed is measured on."""
    pipeline = run.plan.pipeline
    machine = run.workers.executor.environment(pipeline.benchmark.threads)
    device = pipeline.model.device
    return machine if device == "cpu" else machine | {"device": device}


def _with_spread(environment: dict[str, Any]) -> dict[str, Any]:
    """The environment, and how far equal runs lie apart on this machine, where that is known."""
    from gateskip.kernels.build import cache_folder

    spread = stored_spread(cache_folder(), environment)
    return environment if spread is None else environment | {"between_runs": spread}


def _conclude(run: RunState, session: Session | None, environment: dict[str, Any]) -> RunResult:
    """Write results and report where they changed, and make the exports."""
    results = gather(
        run.folder,
        run.plan,
        failures=run.failed_cells,
        session=session,
        environment=environment,
        command=run.settings.command,
    )
    if run.worked or not _is_written(results, run):
        run.worked = True
        save_results(results, run.folder.results_file)
        if run.settings.draw is not None:
            run.settings.draw(run.folder.results_file, run.folder.root)
    exported = _export(run, results)
    _remove_old_references(run)
    failed = [cell for cell in results.cells if cell.status == "failed"]
    return RunResult(0 if exported and not failed else 1, run.folder, results, run.worked)


def _remove_old_references(run: RunState) -> None:
    """Remove the stored predictions of earlier plans' baselines: large files without a use."""
    current = run.folder.reference(run.baseline.key)
    for file in current.parent.glob(".reference-*"):
        if file != current:
            file.unlink()


def _is_written(results: Results, run: RunState) -> bool:
    """Whether the folder has just these results, and the report where one is wanted."""
    file, report = run.folder.results_file, run.folder.root / "report.html"
    if not file.is_file() or (run.settings.draw is not None and not report.is_file()):
        return False
    try:
        return load_results(file).model_dump() == results.model_dump()
    except UserError:
        return False


def _export(run: RunState, results: Results) -> bool:
    """Make the exports that the pipeline names, of cells that did not fail; whether all were
    made that could be."""
    from compose.outputs.export import export_cell, is_current

    whole = True
    for name, export in run.plan.pipeline.export.items():
        cell, target = run.plan.cell(name), Path(export.to)
        measured = results.find(cell.name)
        if measured is None or measured.status != "ok":
            run.board.print(f"✗ no export of {name}: the cell was not measured")
            continue
        if is_current(run.folder, cell.name, target):
            continue
        run.worked = True
        line = run.board.line(f"export {name} to {target}")
        try:
            export_cell(run.folder, cell.name, target, run.workers.executor)
        except (ComposeError, OSError) as error:  # a full disk, or a folder that is not ours
            line.failed(first_line(error))
            whole = False
        else:
            line.done()
    return whole


def thread_pool(slots: int) -> ThreadPoolExecutor:
    """Threads for `run_graph`. They must outlive every worker process that they start.

    The kernel ends a worker with the thread that started it (PR_SET_PDEATHSIG).
    """
    return ThreadPoolExecutor(max_workers=slots, thread_name_prefix="worker")


def run_graph(
    tasks: Iterable[Task], slots: int, abort: Callable[[], None], pool: ThreadPoolExecutor
) -> None:
    """Do all tasks, each after those it needs, at most `slots` at a time, else in their order.

    After an exception of a task no other begins; those that run come to their end, and then it is
    raised. Ctrl-C ends the graph at once: `abort` must end the tasks that are running.
    """
    waiting = list(tasks)
    done: set[str] = set()
    running: dict[Future[None], str] = {}
    failure: Exception | None = None
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
                error = future.exception()
                if error is not None and not isinstance(error, Exception):
                    raise error
                failure = failure or error
            if failure is not None:
                waiting.clear()
    except BaseException:
        abort()
        wait(running)
        raise
    if failure is not None:
        raise failure
