"""Speed: rounds interleaved over the processes of all cells, the baseline in every group.

In a round every cell decodes for the same time, in short turns: the cell that has decoded least so
far goes next. A machine whose speed drifts within seconds then slows all cells alike, and a ratio
of two cells of one round is one of equals.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from compose.bench.speed.workloads import add_turns, categories
from compose.contract import CellCommand, to_json
from compose.errors import ComposeError
from compose.outputs.run_folder import read_phase
from compose.outputs.sessions import (
    Round,
    Session,
    Shape,
    find_session,
    new_session,
    speed_settings,
)
from compose.planning.plan import Cell
from compose.processes.endings import first_line
from compose.processes.worker_process import Worker
from compose.run.cells import cell_job, open_cell
from compose.run.failures import cell_failed
from compose.run.state import RunState

Done = TypeVar("Done")

PROCESS_BYTES = 600_000_000
"""Memory of a cell's process beside its model: interpreter, torch, compiled code."""

MEMORY_SHARE = 0.8
"""How much of the free memory the cells of a group may take together."""

LOADED_AT_ONCE = 2
"""Cells that load side by side before speed is measured: loading hardly uses a second core."""


def measure_speed(
    run: RunState, cells: list[Cell], environment: dict[str, Any], code: str
) -> Session | None:
    """Measure the cells that have not failed, in rounds; go on with a session that was begun.

    Speeds are compared only within a session: a new or changed cell begins a new one, and so does
    other `code`, the fingerprint of what is timed. None where no cell is left to measure.
    """
    timed = [cell for cell in cells if cell.repeats is None]
    able = [cell for cell in timed if cell.name not in run.failed_cells]
    if not able:
        return None
    settings = speed_settings(run.plan, environment, code)
    session = find_session(run.folder, settings, able)
    if session is not None and session.finished():
        return session
    run.worked = True
    if session is None or set(session.members) != {cell.name for cell in able}:
        groups = memory_groups(run, able)
        command = run.settings.command or ""
        source = run.plan.pipeline.benchmark.speed.prompts
        names = categories(source, run.settings.asset_cache) if source else []
        session = new_session(run.folder, settings, able, groups, environment, command, names)
    measurement = _Measurement(run, session, able)
    for group in range(len(session.groups)):
        measurement.measure_group(group)
    measurement.line.done(f"{len(able)} cells, {len(session.groups)} group(s)")
    for file in run.folder.speed.glob("*.jsonl"):
        if file != session.file and not _has_more(run, file, session):
            file.unlink()
    return session


def _has_more(run: RunState, file: Path, session: Session) -> bool:
    """Whether a session with the same settings has cells of the plan that `session` lacks: a run of
    all cells goes on with it."""
    other = Session.load(file)
    if other is None or other.settings != session.settings:
        return False
    planned = {cell.name: cell.key for cell in run.plan.cells}
    return bool((other.members.items() & planned.items()) - session.members.items())


def memory_groups(run: RunState, cells: list[Cell]) -> list[list[str]]:
    """Names of cells that fit into free memory together, in order.

    The baseline is in every group, and so is the plain cell of one that skips or speculates, where
    memory allows: those are what a cell's speed is compared with.
    """
    sizes = {cell.name: _bytes_of(run, cell) for cell in cells}
    held = sum(sizes[name] for name in run.loaded if name in sizes)
    limit = MEMORY_SHARE * (run.workers.executor.free_bytes() + held)
    first = [cell.name for cell in cells if cell is run.baseline]
    groups: list[list[str]] = [list(first)]
    for cell in cells:
        if cell.name in groups[-1]:
            continue
        pair = [name for name in (cell.plain, cell.name) if name in sizes]
        if not _fits(groups[-1], pair, sizes, limit) and len(groups[-1]) > len(first):
            groups.append(list(first))
            if not _fits(groups[-1], pair, sizes, limit):
                pair = [cell.name]
        groups[-1] += [name for name in pair if name not in groups[-1]]
    return groups


def _fits(group: list[str], more: list[str], sizes: dict[str, int], limit: float) -> bool:
    return sum(sizes[name] for name in {*group, *more}) <= limit


def _bytes_of(run: RunState, cell: Cell) -> int:
    """Bytes that a cell's process is expected to hold; another engine has a process beside ours."""
    size = (read_phase(run.folder, run.plan, cell, "load") or {}).get("size", {})
    processes = PROCESS_BYTES * (1 if cell.peer is None else 2)
    return processes + int(size.get("resident_bytes") or size.get("disk_bytes") or 0)


class _Measurement:
    """Measures the rounds of a session that are missing, group by group."""

    def __init__(self, run: RunState, session: Session, cells: list[Cell]) -> None:
        self.run, self.session = run, session
        self.cells = {cell.name: cell for cell in cells}
        self.line = run.board.line("speed")
        self.workers: dict[str, Worker] = {}
        """Cell name -> its process, of the group that is measured now."""
        self.together: bool = session.settings["speed"]["one_process"]
        self.shared: Worker | None = None
        """The process that all cells of ours share, where they do."""
        self.warm: set[tuple[str, Shape]] = set()
        """Cells of that group, and the shapes that they ran before."""

    def measure_group(self, group: int) -> None:
        """Run the group's rounds that are missing, with all its processes loaded at once."""
        session = self.session
        missing = [
            timed_round
            for timed_round in session.planned()
            if timed_round.group == group and not session.complete(timed_round)
        ]
        if not missing:
            return
        cells = [self.cells[name] for name in session.groups[group]]
        try:
            self._load_all(cells)
            self._measure_roofline()
            for count, timed_round in enumerate(missing):
                if count and self.together:
                    self._load_anew(_rotated(cells, timed_round.number))
                self._measure_round(timed_round, cells)
        finally:
            self._end_all()

    def _load_all(self, cells: list[Cell]) -> None:
        for first in range(0, len(cells), LOADED_AT_ONCE):
            some = cells[first : first + LOADED_AT_ONCE]
            names = ", ".join(cell.name for cell in some)
            self.line.update(first, len(cells), "loading", detail=names)
            if self.together:
                self._join([cell for cell in some if cell.peer is None])
                some = [cell for cell in some if cell.peer is not None]
            self._load(some)

    def _end_all(self) -> None:
        for worker in set(self.workers.values()):
            self.run.workers.end(worker)
        self.workers.clear()
        self.shared = None
        self.warm.clear()

    def _measure_roofline(self) -> None:
        """Once a session, before anything is timed, in a process of ours."""
        baseline = self.run.baseline
        able = baseline.name in self.workers and self._goes_on(baseline.name)
        if self.session.roofline is None and able:
            threads = self.run.workers.executor.timed_threads
            roofline = self._ask(baseline, {"do": "roofline", "threads": threads})
            if roofline is not None:
                self.session.add_roofline(roofline)

    def _join(self, cells: list[Cell]) -> None:
        """Load cells one after the other in the process that all of ours share."""
        for cell in cells:
            start = partial(open_cell, self.run, cell, "speed-together", here=True)
            if self.shared is None:
                self.shared = self._guarded(cell, start)
            else:
                command: CellCommand = {"do": "join", "job": to_json(cell_job(self.run, cell))}
                self._guarded(cell, partial(self.run.workers.ask, self.shared, command, self.line))
            if self.shared is not None and self._goes_on(cell.name):
                self.workers[cell.name] = self.shared
                self._ask(cell, {"do": "load"}, note=f"loading {cell.name}")

    def _load_anew(self, cells: list[Cell]) -> None:
        """Load what shares a process once more, in another order: where weights come to lie makes
        a model a percent or two faster or slower than its equal."""
        shared = [
            cell
            for cell in cells
            if self.workers.get(cell.name) is self.shared and self._goes_on(cell.name)
        ]
        for cell in shared[:1]:
            self._ask(cell, {"do": "drop"}, note="loading anew")
        for cell in shared:
            self._ask(cell, {"do": "load"}, note=f"loading {cell.name}")
        names = {cell.name for cell in shared}
        self.warm = {(name, shape) for name, shape in self.warm if name not in names}

    def _load(self, cells: list[Cell]) -> None:
        """Take the processes that are loaded already; load the other cells side by side."""
        absent = [cell for cell in cells if cell.name not in self.run.loaded]
        for cell in cells:
            if cell.name in self.run.loaded:
                self.workers[cell.name] = self.run.loaded.pop(cell.name)
        for cell in absent:
            start = partial(open_cell, self.run, cell, f"speed-{cell.name}", here=True)
            worker = self._guarded(cell, start)
            if worker is not None:
                self.workers[cell.name] = worker
                worker.send({"do": "load"})
        for cell in absent:
            if cell.name in self.workers:
                worker = self.workers[cell.name]
                self._guarded(cell, partial(self.run.workers.answer, worker, self.line))

    def _measure_round(self, timed_round: Round, cells: list[Cell]) -> None:
        """Turns of all cells until each has decoded for long enough.

        The cell that decoded least goes next. Each round begins with another cell, so that none is
        favoured.
        """
        rotated = _rotated(cells, timed_round.number)
        load_average = _load_average()
        started = time.monotonic()
        for cell in rotated:
            self._warm_up(cell, timed_round)
        turns: dict[str, list[dict[str, Any]]] = {cell.name: [] for cell in rotated}
        while waiting := [cell for cell in rotated if self._wants_a_turn(cell, turns[cell.name])]:
            cell = min(waiting, key=lambda cell: _decoded_s(turns[cell.name]))
            note = f"{_shown(timed_round.shape)}, round {timed_round.number + 1}, {cell.name}"
            answer = self._ask(cell, self._command("speed", timed_round), timed_round, note)
            if answer is not None:
                if self.together and cell.peer is None:  # what a process holds is not one cell's
                    answer |= {"peak_bytes": None, "beside_bytes": None}
                turns[cell.name].append(answer)
        numbers = {
            name: add_turns(timed) for name, timed in turns.items() if timed and self._goes_on(name)
        }
        self.session.add(timed_round, numbers, time.monotonic() - started, load_average)

    def _goes_on(self, name: str) -> bool:
        return name not in self.run.failed_cells

    def _wants_a_turn(self, cell: Cell, turns: list[dict[str, Any]]) -> bool:
        if not self._goes_on(cell.name):
            return False
        if not turns:
            return True
        enough: float = self.session.settings["speed"]["min_seconds"]
        decodes: int = turns[-1]["tokens"]  # none with one new token: nothing to go on with
        return decodes > 0 and _decoded_s(turns) < enough

    def _warm_up(self, cell: Cell, timed_round: Round) -> None:
        """A turn that is not counted, before the first of a shape."""
        if (cell.name, timed_round.shape) not in self.warm and self._goes_on(cell.name):
            self.warm.add((cell.name, timed_round.shape))
            note = f"{_shown(timed_round.shape)}, warming up {cell.name}"
            self._ask(cell, self._command("warm", timed_round), timed_round, note)

    def _command(self, do: Literal["warm", "speed"], timed_round: Round) -> CellCommand:
        shape = timed_round.shape
        return {
            "do": do,
            "round": timed_round.number,
            "batch": shape.batch,
            "context": shape.context,
            "category": shape.category,
            "threads": self.run.workers.executor.timed_threads,
        }

    def _ask(
        self,
        cell: Cell,
        command: CellCommand,
        timed_round: Round | None = None,
        note: str = "roofline",
    ) -> dict[str, Any] | None:
        """The answer of a cell's process; None where it fails, and then the cell has failed."""
        planned = self.session.planned()
        done = planned.index(timed_round) if timed_round else 0
        self.line.update(done, len(planned), "speed", detail=note)
        command["cell"] = cell.name
        ask = partial(self.run.workers.ask, self.workers[cell.name], command, self.line)
        return self._guarded(cell, ask)

    def _guarded(self, cell: Cell, work: Callable[[], Done]) -> Done | None:
        """What `work` returns; None where it fails, and then the cell has failed."""
        try:
            return work()
        except ComposeError as error:
            cell_failed(self.run, cell, error, "speed")
            self.run.board.print(f"✗ speed of {cell.name}: {first_line(error)}")
            return None


def _rotated(cells: list[Cell], number: int) -> list[Cell]:
    """Cells in their order, beginning with another one for each number."""
    offset = number % len(cells) if cells else 0
    return [*cells[offset:], *cells[:offset]]


def _decoded_s(turns: Sequence[dict[str, Any]]) -> float:
    """Seconds that a cell has decoded in this round; less than any where it had no turn."""
    return float(sum(turn["decode_s"] for turn in turns)) if turns else -1.0


def _shown(shape: Shape) -> str:
    return shape.category or f"batch {shape.batch}, context {shape.context}"


def _load_average() -> float | None:
    """Processes that wanted to run over the last minute, where the system tells."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
