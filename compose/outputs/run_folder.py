"""The files of a run, and the records of its cells' phases.

    runs/NAME/plan.json                 the plan that it followed
    runs/NAME/cells/CELL/PHASE.json     the record of a phase (load, quality, lossless) and its key
    runs/NAME/speed/SESSION.jsonl       rounds of the cells whose speed was compared
    runs/NAME/failed/NAME.json          crashes and limits that were hit: see `run.failures`
    runs/NAME/jobs, logs                the workers' jobs, and the output of workers and libraries
    runs/NAME/tensorboard/STEP          scalars of training, with `--tensorboard`
    runs/NAME/results.json, report.*    made from the above only
    runs/store/KEY                      model folders, shared by all runs in `runs`

A phase's key covers everything that decides its numbers, including the code and the libraries, so a
record under another key is out of date. Errors that a worker raised are not stored.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from compose.assets import SELF_WRITTEN
from compose.errors import UserError
from compose.planning.fingerprint import fingerprint
from compose.planning.keys import digest, text_hashes
from compose.planning.plan import Cell, Plan, speculates
from compose.results.record import only_finite
from compose.store import Store, read_json, write_json

Phase = Literal["load", "quality", "lossless"]
_SECTIONS: dict[Phase, str] = {
    "load": "",
    "quality": "quality",
    "lossless": "lossless_check",
}
"""Phase -> the section of a cell's result that its record becomes."""
MEASURE_VERSION = 4  # raised when the same cell begins to be measured in another way


@dataclass(frozen=True)
class RunFolder:
    """Paths of everything that belongs to a run."""

    root: Path
    models: Path | None = None
    """The folder of model folders; `store` beside this run where it is None."""

    @classmethod
    def of(cls, plan: Plan, out: Path, models: Path | None = None) -> RunFolder:
        """The folder of a plan's run under `out`, with model folders in `models`."""
        return cls(out.absolute() / plan.pipeline.name, models)

    @classmethod
    def existing(cls, folder: Path) -> RunFolder:
        """The folder of a run that was started before.

        Raises:
            UserError: the folder is not one of a run.
        """
        run = cls(folder.absolute())
        if not run.plan_file.is_file():
            raise UserError(
                f"{folder} is not the folder of a run: it has no {run.plan_file.name}",
                fix="name a folder that `gateskip run` made, such as runs/NAME",
            )
        return run

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for one process; it is made where it does not exist.

        Raises:
            UserError: another process uses it.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(
                f"another process is at work on {self.root}",
                fix="wait for it, or give one of the two another --out or pipeline name",
            ) from None
        try:
            yield
        finally:
            lock.release()

    @property
    def store(self) -> Store:
        """The store of model folders, shared by all runs beside this one, or at `models`."""
        return Store(self.models) if self.models else Store.beside(self.root.parent)

    @property
    def plan_file(self) -> Path:
        """The plan that the run follows."""
        return self.root / "plan.json"

    @property
    def results_file(self) -> Path:
        """The typed result."""
        return self.root / "results.json"

    def log(self, name: str) -> Path:
        """The log of a step or cell."""
        return self.root / "logs" / f"{file_name(name)}.log"

    def job(self, name: str) -> Path:
        """The job file of a step or cell."""
        return self.root / "jobs" / f"{file_name(name)}.json"

    def tensorboard(self, step: str) -> Path:
        """TensorBoard files of a step's training."""
        return self.root / "tensorboard" / file_name(step)

    def record(self, cell: str, phase: Phase) -> Path:
        """The record of a phase of a cell."""
        return self.root / "cells" / file_name(cell) / f"{phase}.json"

    @property
    def speed(self) -> Path:
        """The folder of speed sessions."""
        return self.root / "speed"

    def reference(self, baseline_key: str) -> Path:
        """The baseline's predictions, with which the other cells are compared."""
        return self.root / "cells" / f".reference-{baseline_key}.safetensors"


def file_name(name: str) -> str:
    """A cell's name as a file name: the same unless it is too long or has odd characters."""
    safe = re.sub(r"[^A-Za-z0-9_.+-]", "_", name)
    if safe == name and len(name) <= 120 and not name.startswith("."):
        return name
    return f"{safe[:100].lstrip('.')}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def phase_key(plan: Plan, cell: Cell, phase: Phase, code: str | None = None) -> str:
    """16 hex digits over the cell, the settings and text files that the phase reads, and the
    measuring code.

    `code` is a `fingerprint`; the current one when left out.
    """
    benchmark = plan.pipeline.benchmark.model_dump(mode="json")
    reads: dict[str, Any] = {"threads": benchmark["threads"], "seed": plan.pipeline.seed}
    if phase == "quality":
        reads |= {"quality": benchmark["quality"], "baseline": plan.cells[0].key}
        if cell is plan.cells[0]:
            reads |= {"learns_from": learns_from(plan)}
    elif phase == "lossless":
        reads |= {"lossless": benchmark["lossless"]}
    tasks = plan.pipeline.benchmark.quality.tasks if phase == "quality" else ()
    if files := text_hashes(_texts_of(plan, cell, phase), tasks):
        reads |= {"files": files}
    recipe = {"cell": cell.key, "phase": phase, "reads": reads, "version": MEASURE_VERSION}
    return digest(recipe | {"code": code or fingerprint()})


def _texts_of(plan: Plan, cell: Cell, phase: Phase) -> list[str]:
    """Source of every text that a phase of a cell reads."""
    benchmark = plan.pipeline.benchmark
    if phase == "lossless":
        return [benchmark.lossless.source]
    if phase != "quality":
        return []
    own_answers = benchmark.quality.own_answers
    prompts = [] if own_answers is None else [own_answers.source]
    learned = [source for source, _ in learns_from(plan)] if cell is plan.cells[0] else []
    return [*benchmark.quality.perplexity, *prompts, *learned]


def learns_from(plan: Plan) -> list[tuple[str, int | None]]:
    """Source and row limit of every text that a stage or another engine of the plan reads.

    Text that the model wrote is left out: it cannot teach the model a scored text.
    """
    stages = [step.stage for step in plan.steps if step.stage is not None]
    read: set[str] = {split for stage in stages for split in stage.reads_data}
    read |= {"calibration" for cell in plan.cells if cell.calibrates_peer}
    specs = [getattr(plan.pipeline.data, split) for split in sorted(read)]
    return [
        (source, spec.limit)
        for spec in specs
        for source in (spec.weights if spec is not None else ())
        if source != SELF_WRITTEN
    ]


def phases_of(cell: Cell) -> tuple[Phase, ...]:
    """The phases measured for a cell, without speed.

    Speculation gives the same tokens as the plain cell, so only that equality is measured.
    """
    return ("load", "lossless") if speculates(cell.decode) else ("load", "quality")


def read_phase(run: RunFolder, plan: Plan, cell: Cell, phase: Phase) -> dict[str, Any] | None:
    """The record of the phase for this cell with these settings; None where there is none.

    `seconds` and `fingerprint` are added to it.
    """
    record = _record(run, cell, phase)
    if record is None or record.get("key") != phase_key(plan, cell, phase):
        return None
    result: dict[str, Any] = record["result"]
    return result | {"seconds": record.get("seconds", 0.0), "fingerprint": record["fingerprint"]}


def _record(run: RunFolder, cell: Cell, phase: Phase) -> dict[str, Any] | None:
    record = read_json(run.record(cell.name, phase))
    return record if isinstance(record, dict) else None


def write_phase(
    run: RunFolder,
    plan: Plan,
    cell: Cell,
    phase: Phase,
    result: dict[str, Any],
    seconds: float,
    key: str | None = None,
) -> None:
    """Store the record of the phase under its key.

    `key` is the `phase_key` from before the measurement, since a text may have changed meanwhile;
    the current one when left out. Numbers that are not finite are left out, and the record's notes
    say so.
    """
    record = {
        "key": key or phase_key(plan, cell, phase),
        "fingerprint": fingerprint(),
        "seconds": round(seconds, 3),
        "result": only_finite(result, _SECTIONS[phase]),
    }
    write_json(run.record(cell.name, phase), record)


def is_measured(run: RunFolder, plan: Plan, cell: Cell) -> bool:
    """Whether every phase of a cell, without speed, has its record."""
    records = (read_phase(run, plan, cell, phase) for phase in phases_of(cell))
    return all(record is not None for record in records)


def only_code_changed(run: RunFolder, plan: Plan, cell: Cell) -> bool:
    """Whether records of the cell are out of date only because the code or a library changed."""
    changed = False
    for phase in phases_of(cell):
        record = _record(run, cell, phase) or {}
        made_by = record.get("fingerprint")
        if made_by is None or record.get("key") != phase_key(plan, cell, phase, made_by):
            return False
        changed |= made_by != fingerprint()
    return changed
