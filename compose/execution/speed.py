"""Speed: rounds interleaved over the processes of all cells, the baseline in every group."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import psutil

from compose.errors import ComposeError
from compose.execution.cells import open_cell
from compose.execution.failures import failure_of, first_line
from compose.execution.messages import CellCommand
from compose.execution.run_folder import read_phase
from compose.execution.sessions import (
    Round,
    Session,
    find_session,
    new_session,
    speed_settings,
)
from compose.execution.state import RunState
from compose.execution.worker_process import Worker
from compose.planning.plan import Cell

PROCESS_BYTES = 600_000_000
"""Memory of a cell's process beside its model: interpreter, torch, compiled code."""

MEMORY_SHARE = 0.8
"""How much of the free memory the cells of a group may take together."""

LOADED_AT_ONCE = 2
"""Cells that load side by side before speed is measured: loading hardly uses a second core."""


def measure_speed(run: RunState, cells: list[Cell], environment: dict[str, Any]) -> Session | None:
    """Measure the cells that have not failed, in rounds; go on with a session that was begun.

    Speeds are compared only within a session: a new or changed cell begins a new one. None where no
    cell is left to measure.
    """
    timed = [cell for cell in cells if cell.repeats is None]
    able = [cell for cell in timed if cell.name not in run.failed_cells]
    if not able:
        return None
    settings = speed_settings(run.plan, environment)
    session = find_session(run.folder, settings, able)
    if session is not None and session.finished():
        return session
    run.worked = True
    if session is None or set(session.members) != {cell.name for cell in able}:
        groups = memory_groups(run, able)
        command = run.settings.command or ""
        session = new_session(run.folder, settings, able, groups, environment, command)
    measurement = _Measurement(run, session, able)
    for group in range(len(session.groups)):
        measurement.measure_group(group)
    measurement.line.done(f"{len(able)} cells, {len(session.groups)} group(s)")
    for other in run.folder.speed.glob("*.jsonl"):
        if other != session.file:
            other.unlink()
    return session


def memory_groups(run: RunState, cells: list[Cell]) -> list[list[str]]:
    """Names of cells that fit into free memory together, in order, the baseline in every group."""
    sizes = {cell.name: _bytes_of(run, cell) for cell in cells}
    held = sum(sizes[name] for name in run.loaded if name in sizes)
    limit = MEMORY_SHARE * (psutil.virtual_memory().available + held)
    first = [cell.name for cell in cells if cell is run.baseline]
    groups: list[list[str]] = [list(first)]
    for cell in cells:
        if cell is run.baseline:
            continue
        used = sum(sizes[name] for name in groups[-1])
        if used + sizes[cell.name] > limit and len(groups[-1]) > len(first):
            groups.append(list(first))
        groups[-1].append(cell.name)
    return groups


def _bytes_of(run: RunState, cell: Cell) -> int:
    """Bytes that a cell's process is expected to hold."""
    size = (read_phase(run.folder, run.plan, cell, "load") or {}).get("size", {})
    return PROCESS_BYTES + int(size.get("resident_bytes") or size.get("disk_bytes") or 0)


class _Measurement:
    """Measures the rounds of a session that are missing, group by group."""

    def __init__(self, run: RunState, session: Session, cells: list[Cell]) -> None:
        self.run, self.session = run, session
        self.cells = {cell.name: cell for cell in cells}
        self.line = run.board.line("speed")
        self.workers: dict[str, Worker] = {}
        """Cell name -> its process, of the group that is measured now."""

    def measure_group(self, group: int) -> None:
        """Run the group's rounds that are missing, with all its processes loaded at once."""
        session = self.session
        missing = [
            each for each in session.planned() if each.group == group and not session.complete(each)
        ]
        if not missing:
            return
        cells = [self.cells[name] for name in session.groups[group]]
        try:
            for first in range(0, len(cells), LOADED_AT_ONCE):
                some = cells[first : first + LOADED_AT_ONCE]
                names = ", ".join(cell.name for cell in some)
                self.line.update(first, len(cells), "loading", detail=names)
                self._load(some)
            for each in missing:
                self._measure_round(each, cells)
        finally:
            for worker in self.workers.values():
                self.run.workers.end(worker)
            self.workers.clear()

    def _load(self, cells: list[Cell]) -> None:
        """Take the processes that are loaded already; load the other cells side by side."""
        absent = [cell for cell in cells if cell.name not in self.run.loaded]
        for cell in cells:
            if cell.name in self.run.loaded:
                self.workers[cell.name] = self.run.loaded.pop(cell.name)
        for cell in absent:
            worker = open_cell(self.run, cell, f"speed-{cell.name}", on_this_machine=True)
            self.workers[cell.name] = worker
            worker.send({"do": "load"})
        for cell in absent:
            worker = self.workers[cell.name]
            self._guarded(cell, partial(self.run.workers.answer, worker, self.line))

    def _measure_round(self, each: Round, cells: list[Cell]) -> None:
        """Every cell once. Each round begins with another cell, so that none is favoured."""
        offset = each.number % len(cells)
        numbers: dict[str, dict[str, Any]] = {}
        started = time.monotonic()
        before, turns = self._turns(each)
        for turn, cell in enumerate([*cells[offset:], *cells[:offset]]):
            if cell.name in self.run.failed_cells:
                continue
            detail = f"batch {each.batch}, round {each.number + 1}, {cell.name}"
            self.line.update(before + turn, turns, "speed", detail=detail)
            command: CellCommand = {
                "do": "speed",
                "round": each.number,
                "batch": each.batch,
                "threads": self.run.workers.executor.timed_threads,
            }
            worker = self.workers[cell.name]
            ask = partial(self.run.workers.ask, worker, command, self.line)
            answer = self._guarded(cell, ask)
            if answer is not None:
                numbers[cell.name] = answer
        self.session.add(each, numbers, time.monotonic() - started)

    def _turns(self, each: Round) -> tuple[int, int]:
        """Turns (one cell measured once) before this round, and in all."""
        sizes = [len(self.session.groups[other.group]) for other in self.session.planned()]
        return sum(sizes[: self.session.planned().index(each)]), sum(sizes)

    def _guarded(self, cell: Cell, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What `work` returns; None where it fails, and then the cell has failed."""
        try:
            return work()
        except ComposeError as error:
            self.run.failed_cells[cell.name] = failure_of(error, "speed")
            self.run.board.print(f"✗ speed of {cell.name}: {first_line(error)}")
            return None
