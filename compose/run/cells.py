"""Cells: loading and quality are measured in one process a cell, which may stay for speed."""

from __future__ import annotations

import time
from functools import partial
from typing import Any, cast

from compose.contract import Backend, CellCommand, CellJob
from compose.errors import AssetError, ComposeError
from compose.outputs.run_folder import (
    Phase,
    is_measured,
    learns_from,
    phase_key,
    phases_of,
    write_phase,
)
from compose.planning.plan import Cell, cell_needs
from compose.processes.endings import first_line
from compose.processes.worker_process import Worker
from compose.run.failures import attempted, cell_failed, pass_over_cell
from compose.run.state import Line, RunState, Task

FREE_BYTES_TO_KEEP = 8_000_000_000
"""Free memory, in bytes, below which no further process is kept between quality and speed."""


def quality_tasks(run: RunState, cells: list[Cell]) -> list[Task]:
    """A task for the quality of every cell; the baseline's comes first, the others compare.

    Other engines are made ready and scored one after another: some compile or convert for minutes.
    """
    baseline = run.baseline
    steps = {step.key for step in run.plan.steps}
    peers = [cell.name for cell in cells if cell.peer is not None]
    return [
        Task(
            cell.name,
            partial(measure_quality, run, cell),
            (
                *steps.intersection((cell.weights, baseline.weights)),
                *(() if cell is baseline else (baseline.name,)),
                *(peers[: peers.index(cell.name)][-1:] if cell.peer is not None else ()),
            ),
        )
        for cell in cells
    ]


def measure_quality(run: RunState, cell: Cell) -> None:
    """Run those phases of a cell that have no record yet, in one process.

    Raises:
        AssetError: the baseline's data is not available; the other cells need the same.
    """
    if cell.weights in run.failed_steps:
        run.failed_cells[cell.name] = run.failed_steps[cell.weights]
        return
    if pass_over_cell(run, cell):
        return
    if is_measured(run.folder, run.plan, cell) and not (
        cell is run.baseline and _lacks_reference(run)
    ):
        return
    run.worked = True
    line = run.board.line(f"measure {cell.name}", cell=cell.name)
    measurement = _Measurement(run, cell, line)
    try:
        result = attempted(run, cell.name, line, measurement.measure)
    except ComposeError as error:
        line.failed(first_line(error))
        if isinstance(error, AssetError) and cell is run.baseline:
            raise
        cell_failed(run, cell, error, measurement.phase)
    else:
        line.done(_note(result))


class _Measurement:
    """Loading and scoring one cell in one process, and the phase that it is in."""

    def __init__(self, run: RunState, cell: Cell, line: Line) -> None:
        self.run, self.cell, self.line = run, cell, line
        self.phase: Phase = "load"

    def measure(self) -> dict[str, Any]:
        """Run all phases and keep their records; the result of the last one.

        The process stays for speed where memory allows, else it is ended.
        """
        run, cell, result = self.run, self.cell, dict[str, Any]()
        self.phase = "load"
        _make_room(run, cell)
        worker = open_cell(run, cell, f"cell-{cell.name}")
        try:
            for self.phase in phases_of(cell):
                self.line.update(0, 1, self.phase)
                command: CellCommand = {"do": self.phase}
                if self.phase == "quality":
                    command["reference"] = str(run.folder.reference(run.baseline.key))
                key = phase_key(run.plan, cell, self.phase)
                started = time.monotonic()
                result = run.workers.ask(worker, command, self.line)
                seconds = time.monotonic() - started
                write_phase(run.folder, run.plan, cell, self.phase, result, seconds, key)
            if _keeps(run, cell):
                run.loaded[cell.name] = worker
            return result
        finally:
            if run.loaded.get(cell.name) is not worker:
                run.workers.end(worker)


def _keeps(run: RunState, cell: Cell) -> bool:
    """Whether a cell's process stays for the speed phase: it runs here, and memory allows.

    Importing and loading again would take longer than measuring.
    """
    alone = not run.plan.pipeline.benchmark.speed.one_process
    timed = cell.repeats is None and run.workers.executor.local and alone
    return timed and run.workers.executor.free_bytes() >= FREE_BYTES_TO_KEEP


def _make_room(run: RunState, cell: Cell) -> None:
    """End processes that stayed for speed, where a cell needs their memory to be measured."""
    needed = cell_needs(run.plan, cell, run.store).memory or 0
    for name in list(run.loaded):
        if run.workers.executor.free_bytes() >= needed:
            return
        worker = run.loaded.pop(name, None)  # which another thread may have ended
        if worker is not None:
            run.workers.end(worker)


def _lacks_reference(run: RunState) -> bool:
    """Whether a cell is still to be compared with baseline predictions that are not stored."""
    quality = run.plan.pipeline.benchmark.quality
    if not quality.perplexity and quality.own_answers is None:
        return False
    if run.folder.reference(run.baseline.key).is_file():
        return False
    return not all(is_measured(run.folder, run.plan, cell) for cell in run.wanted_cells())


def open_cell(run: RunState, cell: Cell, name: str, *, here: bool = False) -> Worker:
    """Start a cell's process under the log `name`; it loads nothing before it is asked to."""
    needs = cell_needs(run.plan, cell, run.store, here=here)
    return run.workers.start(name, cell_job(run, cell), needs)


def cell_job(run: RunState, cell: Cell) -> CellJob:
    """What a process has to know to measure a cell."""
    pipeline, baseline = run.plan.pipeline, run.baseline
    return CellJob(
        name=cell.name,
        folder=run.folder_of(cell),
        baseline_folder=run.folder_of(baseline),
        decode=None if cell.decode is None else cell.decode.model_dump(mode="json"),
        benchmark=pipeline.benchmark.model_dump(mode="json"),
        seed=pipeline.seed,
        dtype=cell.dtype or pipeline.model.dtype,
        backend=cast(Backend, cell.backend),
        baseline_backend=baseline.backend,
        peer=cell.peer,
        calibration=pipeline.data.calibration if cell.calibrates_peer else None,
        asset_cache=run.settings.asset_cache.absolute(),
        reference=run.folder.reference(baseline.key),
        threads=pipeline.benchmark.threads,
        learns_from=learns_from(run.plan) if cell is baseline else (),
        device=pipeline.model.device,
    )


def _note(result: dict[str, Any]) -> str:
    """The number of a finished cell that is shown on its line."""
    perplexity = (result.get("perplexity") or {}).get("value")
    if perplexity is not None:
        return f"perplexity {perplexity:.2f}"
    if "lossless" in result:
        return "lossless" if result["lossless"] else "not lossless"
    return ""
